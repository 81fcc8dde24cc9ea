"""Public functions and registration of upsampling with cross-entropy, or hard example mining, and with argmax."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from allspark_fast.kernels.arguments import (
    FLOATING,
    check_choice,
    check_count,
    check_integer,
    check_number,
    check_size,
    check_tensor,
)
from allspark_fast.kernels.triton_support import implementation
from allspark_fast.kernels.upsample_cross_entropy import chunked

Reduction = Literal["mean", "sum", "none"]


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 0,
) -> Tensor:
    """Return the cross-entropy of logits that are first upsampled bilinearly (align_corners=False) to the target size.

    With ``ohem_threshold``, hard examples are mined by the rule of the reference implementation: of all valid pixels,
    only those whose target probability is at most the threshold count, and at least the ``ohem_min_kept`` hardest; if
    fewer pixels than that are valid, or ``ohem_min_kept`` is 0, all count.

    Args:
        logits: (B, K, h, w), any float dtype and strides; half precision is computed in float32.
        target: (B, H, W) int64, classes in [0, K) or ``ignore_index``.
        ignore_index: pixels of this target do not count.
        reduction: ``mean`` over the pixels that count, ``sum``, or ``none``.
        ohem_threshold: probability in [0, 1], or None for no mining.
        ohem_min_kept: number of pixels, at least 0.

    Returns:
        the loss, of shape (), or (B, H, W) for ``none`` with 0 at pixels that do not count; float32 (float64 for
        float64 logits). If no pixel counts, ``mean`` is 0 with zero gradients. Non-finite logits give a non-finite
        loss.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: a shape, device, option or, on the CPU, a class of ``target`` is invalid. On a GPU, where the check
            would wait for the device, such a class gives a NaN loss (float64: a device-side assertion).
    """
    check_integer("ignore_index", ignore_index)
    sizes: dict[str, int] = {}
    check_tensor("logits", logits, "(B, K, h, w)", FLOATING, sizes=sizes, not_empty="K h w")
    check_tensor("target", target, "(B, H, W)", (torch.int64,), logits, sizes, not_empty="H W")
    check_choice("reduction", reduction, get_args(Reduction))
    if ohem_threshold is not None:
        check_number("ohem_threshold", ohem_threshold)
        if not 0 <= ohem_threshold <= 1:
            raise ValueError(f"ohem_threshold must be a probability in [0, 1] or None, got {ohem_threshold}")
    check_count("ohem_min_kept", ohem_min_kept, least=0)
    loss, _ = _upsample_cross_entropy(logits, target, ignore_index)
    counts = target != ignore_index
    if ohem_threshold is not None:
        counts = _hard_examples(loss.detach(), counts, ohem_threshold, ohem_min_kept)
        loss = loss.where(counts, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp(min=1)


def _hard_examples(loss: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Return the mask of the valid pixels that count; a pixel's target probability is exp(-loss)."""
    if min_kept == 0 or loss.numel() == 0:
        return valid
    probability = torch.exp(-loss).masked_fill(~valid, 1)
    # Not kthvalue, whose index makes torch.use_deterministic_algorithms refuse it on a GPU.
    kth_smallest = probability.flatten().sort().values[min(min_kept, probability.numel()) - 1]
    # Not <=: a probability that is NaN counts, so that the loss is.
    mined = valid & ~(probability > kth_smallest.clamp(min=threshold))
    return mined | (valid & (valid.sum() < min_kept))


def _check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"target holds class {wrong[0].item()}, expected [0, {classes}) or ignore_index = {ignore_index}"
        )


@torch.library.custom_op("allspark_fast::upsample_cross_entropy", mutates_args=())
def _upsample_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return loss and log-sum-exp of every pixel."""
    if target.device.type == "cpu":
        _check_classes(target, logits.shape[1], ignore_index)
    with torch.cuda.device_of(logits):
        return implementation(chunked, logits).forward(logits, target, ignore_index)


@_upsample_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty(target.shape, dtype=dtype)


@torch.library.custom_op("allspark_fast::upsample_cross_entropy_backward", mutates_args=())
def _upsample_cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    with torch.cuda.device_of(logits):
        return implementation(chunked, logits).backward(grad, logits, target, lse, ignore_index)


@_upsample_cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
    return _upsample_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.ignore_index), None, None


_upsample_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Label every pixel by logits that are first upsampled bilinearly (align_corners=False).

    Args:
        logits: (B, K, h, w), any float dtype and strides; half precision is computed in float32.
        size: (H, W) of the labels, in pixels.

    Returns:
        labels (B, H, W) int64, the first maximum over K, and confidence (B, H, W), the softmax probability of the
        label; float32 (float64 for float64 logits). No gradient flows. Pixels with a NaN have the first NaN's class
        and a NaN confidence.

    Raises:
        TypeError: ``logits`` is not a float tensor, or ``size`` not a pair of integers.
        ValueError: a shape or size is wrong.
    """
    check_tensor("logits", logits, "(B, K, h, w)", FLOATING, not_empty="K h w")
    check_size("size", size)
    return _upsample_argmax(logits.detach(), list(size))


@torch.library.custom_op("allspark_fast::upsample_argmax", mutates_args=())
def _upsample_argmax(logits: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits):
        return implementation(chunked, logits).upsample_argmax(logits, (size[0], size[1]))


@_upsample_argmax.register_fake
def _(logits: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], *size)
    confidence = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logits.new_empty(shape, dtype=torch.int64), confidence
