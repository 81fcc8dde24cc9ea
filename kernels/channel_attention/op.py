"""Public function, registration and dispatch of channel attention."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from allspark_fast.kernels.arguments import FLOATING, check_choice, check_number, check_tensor
from allspark_fast.kernels.channel_attention import chunked, reference
from allspark_fast.kernels.channel_attention.inputs import Inputs
from allspark_fast.kernels.triton_support import implementation

Backend = Literal["auto", "triton", "chunked", "reference"]
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
    sizes: dict[str, int] = {}
    check_tensor("query", query, "(B, H, N, Cq)", FLOATING, sizes=sizes, not_empty="H N Cq")
    if isinstance(key, Tensor) and key.shape[:1] != (1,):
        sizes["B or 1"] = sizes["B"]
    check_tensor("key", key, "(B or 1, H, N, L)", (query.dtype,), query, sizes, not_empty="L")
    check_tensor("value", value, "(B or 1, H, N, L)", (query.dtype,), query, sizes)
    if group_mask is not None:
        check_tensor("group_mask", group_mask, "(G,)", (torch.bool,), query, sizes)
        if sizes["G"] == 0 or sizes["L"] % sizes["G"]:
            raise ValueError(f"group_mask has {sizes['G']} groups, which do not divide the key's L = {sizes['L']}")
    if seed is not None:
        check_tensor("seed", seed, "()", (torch.int64,), query)
    check_number("eps", eps)
    if not eps > 0:  # at 0 a constant map is 0/0
        raise ValueError(f"eps must be above 0, got {eps}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    check_choice("backend", backend, get_args(Backend))
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
        inputs = Inputs(query, key, value, column_mask, dropout_p, seed)
        return implementation(chunked, key, backend=backend).forward(inputs, eps)


@_channel_attention.register_fake
def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    statistics = query.new_empty((2, *query[:, :, 0].shape), dtype=torch.promote_types(query.dtype, torch.float32))
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
        return _fake_backward(grad, query, key, value)
    inputs = Inputs(query, key, value, column_mask, dropout_p, seed)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        return implementation(chunked, key, backend=backend).backward(grad, statistics, inputs)


@_channel_attention_backward.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, column_mask, _eps, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, output[1], column_mask, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    grads = _channel_attention_backward(grad, *saved, ctx.dropout_p, seed, ctx.backend)
    return *grads, None, None, None, None, None


_channel_attention.register_autograd(_backward, setup_context=_save_for_backward)
