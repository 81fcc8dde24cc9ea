"""Checks of every operator on a device against its reference in float64: for machines that nobody has tried yet."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from allspark_fast.kernels.channel_attention import Backend, channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.depthwise_gelu import reference as depthwise_reference
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.kernels.semantic_memory import reference as memory_reference
from allspark_fast.kernels.triton_support import is_interpreted, set_kernels
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import reference as loss_reference
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# What an operator gives, and in float64 what it should.
Comparison = tuple[Sequence[Tensor], Sequence[Tensor]]


class Result(NamedTuple):
    """The outcome of an operator in one dtype.

    Attributes:
        op: the operator's name.
        dtype: such as ``float32``.
        error: max|a - b| / max|b|, the largest of outputs and gradients; NaN if the operator raised.
        failure: why it failed, empty if it passed.
    """

    op: str
    dtype: str
    error: float
    failure: str


def check_kernels(device: torch.device) -> list[Result]:
    """Run every operator forward and backward, by its Triton kernels where ``device`` runs them, else by plain torch.

    bfloat16 is left out in Triton's interpreter, which multiplies it wrongly.
    """
    dtypes = [x for x in TOLERANCE if not (is_interpreted() and x == torch.bfloat16)]
    previous = set_kernels("triton")
    try:
        return [_check(compare, device, dtype) for compare in _COMPARISONS for dtype in dtypes]
    finally:
        set_kernels(previous)


def passed(results: Sequence[Result]) -> bool:
    """Return whether nothing failed."""
    return not any(result.failure for result in results)


def results_table(results: Sequence[Result]) -> str:
    """Return a table with a row for each result."""
    return "\n".join(f"{x.op:27}{x.dtype:10}{x.error:<9.1e}{x.failure or 'ok'}" for x in results)


def _check(
    compare: Callable[[torch.device, torch.dtype], Comparison], device: torch.device, dtype: torch.dtype
) -> Result:
    error, failure = float("nan"), ""
    try:
        actual, expected = compare(device, dtype)
        errors = [(x.cpu() - y).abs().max() / y.abs().max() for x, y in zip(actual, expected, strict=True)]
        error = torch.stack(errors).max().item()  # unlike the built-in max, this keeps a NaN
        if not error <= TOLERANCE[dtype]:
            failure = f"wrong by {error:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    except Exception as problem:  # whatever a compiler or a driver raises
        failure = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    return Result(compare.__name__.removeprefix("_"), str(dtype).removeprefix("torch."), error, failure)


def _random(seed: int, *shape: int) -> Tensor:
    """Draw float64 numbers on the CPU; torch's own generator is left alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _with_gradients(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], device: torch.device
) -> Comparison:
    leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    output, expected = op(*leaves), reference(*exact)
    weight = _random(9, *expected.shape).to(output.dtype)
    grads = torch.autograd.grad(output, leaves, weight.to(device))
    return [output, *grads], [expected, *torch.autograd.grad(expected, exact, weight.double())]


def _channel_attention(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare on the tokens of a Pascal crop, with dropout and a masked group."""
    inputs = [_random(i, *shape).to(dtype) for i, shape in enumerate([(2, 1, 289, 32), *2 * [(1, 1, 289, 96)]])]

    def attend(*inputs: Tensor, backend: Backend) -> Tensor:
        mask, seed = (torch.tensor(x, device=inputs[0].device) for x in ([True, False, True], 1))
        return channel_attention(*inputs, group_mask=mask, dropout_p=0.1, seed=seed, backend=backend)

    return _with_gradients(partial(attend, backend="auto"), partial(attend, backend="reference"), inputs, device)


def _upsample_cross_entropy(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare the loss of every pixel; some are ignored."""
    target = torch.arange(2 * 17 * 49).view(2, 17, 49) % 22
    op = partial(upsample_cross_entropy, target=target.to(device), ignore_index=21, reduction="none")
    reference = partial(loss_reference.forward, target=target, ignore_index=21)
    return _with_gradients(op, reference, [_random(0, 2, 21, 5, 13).to(dtype)], device)


def _depthwise_gelu(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare on a map that fills no tile, with float32 weights, as under autocast."""
    weights = _random(1, 80, 1, 3, 3).float(), _random(2, 80).float()
    op, reference = (partial(x, size=(19, 11)) for x in (depthwise_gelu, depthwise_reference.forward))
    return _with_gradients(op, reference, [_random(0, 2, 19 * 11, 80).to(dtype), *weights], device)


def _upsample_argmax(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare the chosen labels' probability and their confidence with the largest probability: ties do not matter."""
    logits = _random(0, 2, 21, 5, 13).to(dtype)
    labels, confidence = upsample_argmax(logits.to(device), (17, 49))
    full = interpolate(logits.double(), (17, 49), mode="bilinear", align_corners=False).softmax(1)
    return [full.gather(1, labels.cpu()[:, None]), confidence], [full.amax(1, keepdim=True), full.amax(1)]


def _channel_semantic_grouping(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare the chosen classes' similarity with the largest: ties do not matter."""
    features, class_map = _random(0, 2, 289, 64).to(dtype), _random(1, 2, 21, 289).to(dtype)
    chosen = channel_semantic_grouping(features.to(device), class_map.to(device)).cpu()
    similarity = normalize(class_map.double(), dim=2) @ features.double()
    return [similarity.gather(1, chosen[:, None])], [similarity.amax(1, keepdim=True)]


def _semantic_memory_enqueue(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Compare with more channels than a class has room for, and channels of no class."""
    features, channel_class = _random(0, 2, 289, 64).to(dtype), torch.arange(2 * 64).view(2, 64) % 7 - 1
    queue, queue_ptr = torch.zeros(289, 5, 16).permute(1, 2, 0), torch.arange(5)
    actual = queue.to(device, copy=True), queue_ptr.to(device, copy=True)
    semantic_memory_enqueue(*actual, features.to(device), channel_class.to(device))
    memory_reference.semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
    return actual, [queue.double(), queue_ptr.double()]


_COMPARISONS = (
    _channel_attention,
    _upsample_cross_entropy,
    _upsample_argmax,
    _depthwise_gelu,
    _channel_semantic_grouping,
    _semantic_memory_enqueue,
)
