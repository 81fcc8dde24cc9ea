"""Public function, registration and dispatch of channel attention."""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from allspark_fast.kernels.arguments import (
    FLOATING,
    check_choice,
    check_not_empty,
    check_number,
    check_shape,
    check_tensor,
)
from allspark_fast.kernels.channel_attention import chunked, reference
from allspark_fast.kernels.channel_attention.inputs import Inputs, accumulation_dtype
from allspark_fast.kernels.triton_support import check_triton_runs, prefers_triton

Backend = Literal["auto", "triton", "chunked", "reference"]
_BACKENDS = ("auto", "triton", "chunked", "reference")
# Maps of fewer tokens have so low a rank that gradients nearly cancel: 3 % off with operands in half precision.
_MIN_HALF_TOKENS = 16


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group_mask: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return channel-wise attention with an instance-normalized similarity map.

    Computes softmax(InstanceNorm(queryᵀ key)) valueᵀ: channels attend to channels, and spatial tokens are their
    features (channel-wise cross-attention, UCTransNet; cf. XCiT's cross-covariance attention; AllSpark, "Channel-wise
    Cross-attention"). Each map (b, h) is normalized as a whole, without affine parameters or 1/sqrt(d).

    Args:
        query: (B, H, N, Cq), tokens first. float16, bfloat16, float32 or float64, any strides.
        key: (B or 1, H, N, L); batch size 1 is shared by all samples. Dtype of ``query``.
        value: the shape and dtype of ``key``.
        group_mask: bool (G,) on the query's device; L = G · Ck, group-major. Groups that are False leave the softmax
            and the norm's statistics; if all are, the output is zero.
        eps: above 0, added to the variance of the map.
        dropout_p: probability of dropping an entry of the attention map, in [0, 1).
        seed: int64 () on the query's device, from which all backends hash the same dropout mask; None draws one
            from torch's generator there.
        backend: ``triton``, ``chunked`` (plain torch, a block of rows at a time), ``reference`` (plain torch,
            everything materialized), or ``auto``: ``triton`` on CUDA from sm_80 but for float64, else ``chunked``.
            While it runs, ``triton`` holds one map of H · Cq · L entries in forward and two in backward, of as many
            samples as fit into ``kernel.WORKSPACE_BYTES`` (256 MiB), at least one. Only ``reference`` keeps a map.

    Returns:
        (B, H, N, Cq) in the query's dtype, accumulated in float32 (float64 for float64); with fewer than 16 tokens
        half precision is computed in float32 throughout. Inputs that are not finite give results that are not finite.

    Raises:
        TypeError: an argument is no tensor, its dtype is wrong, or ``eps`` or ``dropout_p`` is no number.
        ValueError: a shape, device, number or ``backend`` is wrong, or the backend cannot do what is asked.
    """
    _check_arguments(query, key, value, group_mask, seed)
    check_number("eps", eps)
    if not eps > 0:  # at 0 a constant map is 0/0
        raise ValueError(f"eps must be above 0, got {eps}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    check_choice("backend", backend, _BACKENDS)
    if backend == "triton":
        check_triton_runs("query", query)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    dtype = query.dtype
    if dtype.itemsize == 2 and query.shape[2] < _MIN_HALF_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
    column_mask = None if group_mask is None else group_mask.repeat_interleave(key.shape[-1] // group_mask.shape[0])
    if backend == "reference":
        with torch.autocast(query.device.type, enabled=False):
            inputs = Inputs(query, key, value, column_mask, dropout_p, seed)
            return reference.channel_attention(inputs, eps).to(dtype)
    output, _ = _channel_attention(query, key, value, column_mask, eps, dropout_p, seed, backend)
    return output.to(dtype)


def _check_arguments(query: Tensor, key: Tensor, value: Tensor, group_mask: Tensor | None, seed: Tensor | None) -> None:
    check_tensor("query", query, "(B, H, N, Cq)", FLOATING)
    check_not_empty("query", query, {"H": 1, "N": 2, "Cq": 3})
    batch, heads, tokens, _ = query.shape
    check_tensor("key", key, "(B or 1, H, N, L)", (query.dtype,), like=query)
    key_batch = key.shape[0] if key.shape[0] in (batch, 1) else batch
    check_shape("key", key, "(B or 1, H, N, L)", (key_batch, heads, tokens, key.shape[-1]))
    check_not_empty("key", key, {"L": 3})
    check_tensor("value", value, "(B or 1, H, N, L)", (query.dtype,), like=query)
    check_shape("value", value, "the shape of key", tuple(key.shape))
    if group_mask is not None:
        check_tensor("group_mask", group_mask, "(G,)", (torch.bool,), like=query)
        groups = group_mask.shape[0]
        if groups == 0 or key.shape[-1] % groups:
            raise ValueError(f"group_mask has {groups} groups, which do not divide the key's L = {key.shape[-1]}")
    if seed is not None:
        check_tensor("seed", seed, "()", (torch.int64,), like=query)


def _implementation(key: Tensor, backend: str) -> ModuleType:
    """The module that runs, decided inside the operators: tracing needs no device."""
    if backend == "triton" or (backend == "auto" and prefers_triton(key)):
        from allspark_fast.kernels.channel_attention import kernel  # noqa: PLC0415 triton is optional

        return kernel
    return chunked


@torch.library.custom_op("allspark_fast::channel_attention", mutates_args=())
def _channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    column_mask: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The output, and what backward needs to know of rows, (2, B, H, Cq); see ``chunked.forward``."""
    if query.shape[0] == 0:
        return _fake_forward(query)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        return _implementation(key, backend).forward(Inputs(query, key, value, column_mask, dropout_p, seed), eps)


@_channel_attention.register_fake
def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    statistics = query.new_empty((2, *query[:, :, 0].shape), dtype=accumulation_dtype(query.dtype))
    return query.new_empty(query.shape), statistics


@torch.library.custom_op("allspark_fast::channel_attention_backward", mutates_args=())
def _channel_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    if query.shape[0] == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    inputs = Inputs(query, key, value, column_mask, dropout_p, seed)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        return _implementation(key, backend).backward(grad, statistics, inputs)


@_channel_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, column_mask, _eps, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, output[1], column_mask, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    grads = _channel_attention_backward(grad, *saved, ctx.dropout_p, seed, ctx.backend)
    return *grads, None, None, None, None, None


_channel_attention.register_autograd(_backward, setup_context=_save_for_backward)
