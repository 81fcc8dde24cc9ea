"""Public function, registration and dispatch of channel attention."""

import math
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from allspark_fast.kernels.arguments import (
    FLOATING,
    check_choice,
    check_not_empty,
    check_number,
    check_shape,
    check_tensor,
)
from allspark_fast.kernels.channel_attention import chunked, reference
from allspark_fast.kernels.channel_attention.similarity_norm import accumulation_dtype, similarity_rstd
from allspark_fast.kernels.triton_support import check_triton_runs, prefers_triton

Backend = Literal["auto", "triton", "chunked", "reference", "sdpa", "xformers"]
_BACKENDS = ("auto", "triton", "chunked", "reference", "sdpa", "xformers")
_LIBRARY_BACKENDS = ("sdpa", "xformers")
# Their kernels read 16 bytes at a time: head dims must be multiples of 8 half-precision numbers.
_LIBRARY_ALIGNMENT = 8
# Maps of fewer tokens have so low a rank that gradients nearly cancel: 3 % off with operands in half precision. Tensor
# cores would fill the tokens up to 16 anyway.
_MIN_HALF_TOKENS = 16
# Added to masked logits; a float16 can hold it, and exp(-30000) is 0 beside any instance-normalised logit.
_MASKED_LOGIT = -30000.0


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
    """Channel-wise attention with an instance-normalised similarity map: softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Every channel is a token of the attention and every spatial token one of its features (channel-wise
    cross-attention, UCTransNet; cf. XCiT's cross-covariance attention; AllSpark, "Channel-wise Cross-attention"). Each
    map (b, h) is normalised as a whole, without affine parameters or 1/sqrt(d). Only ``reference`` forms the map.

    Args:
        query: (B, H, N, Cq), tokens first. float16, bfloat16, float32 or float64, any strides.
        key: (B or 1, H, N, L); batch size 1 is shared by all samples. Dtype of ``query``.
        value: the shape and dtype of ``key``.
        group_mask: bool (G,) on the query's device; L = G · Ck, group-major. Groups that are False leave the softmax
            and the norm's statistics; if all are, the output is zero.
        eps: above 0, added to the variance of the map.
        dropout_p: probability of dropping an entry of the attention map, in [0, 1).
        seed: int64 tensor of shape () on the query's device, from which the dropout mask is hashed, equal for all
            backends; None draws one from torch's generator there.
        backend: ``triton`` (kernels, bounded memory), ``chunked`` (plain torch in chunks of L, bounded memory),
            ``reference`` (plain torch, materialised), ``sdpa`` or ``xformers`` (their memory-efficient kernels, without
            dropout), or ``auto``: ``triton`` on CUDA from sm_80 in half and single precision, else ``chunked``.

    Returns:
        (B, H, N, Cq) in the query's dtype, accumulated in float32 (float64 for float64); with fewer than 16 tokens
        half precision is computed in float32 throughout. Inputs that are not finite give results that are not finite.

    Raises:
        TypeError: an argument is no tensor, its dtype is wrong, or ``eps`` or ``dropout_p`` is no number.
        ValueError: a shape, device, number or ``backend`` is wrong, or the backend cannot do what is asked.
    """
    _check_arguments(query, key, value, group_mask, eps, dropout_p, seed, backend)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    dtype = query.dtype
    if dtype.itemsize == 2 and query.shape[2] < _MIN_HALF_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
    column_mask = None if group_mask is None else _expand_groups(group_mask, key.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        if backend == "reference":
            return reference.channel_attention(query, key, value, column_mask, eps, dropout_p, seed).to(dtype)
        # The gradients that meet at the query nearly cancel: they are added before they are rounded.
        query = query.to(accumulation_dtype(query.dtype))
        rstd, key_mean = similarity_rstd(query, key, column_mask, eps)
        key_mean = key_mean.detach()  # a shift of every row, which softmax ignores
        if backend in _LIBRARY_BACKENDS:
            centered_key = (key - key_mean).to(key.dtype)
            scaled_query = (query * rstd).to(key.dtype)
            return _library_attention(scaled_query, centered_key, value, column_mask, backend).to(dtype)
        output, _ = _softmax_attention(query, key, value, rstd, key_mean, column_mask, dropout_p, seed, backend)
        return output.to(dtype)


def _expand_groups(group_mask: Tensor, columns: int) -> Tensor:
    return group_mask[:, None].expand(-1, columns // group_mask.shape[0]).reshape(columns)


def _implementation(key: Tensor, backend: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` run, decided inside the operators: tracing needs no device."""
    if backend == "triton" or (backend == "auto" and prefers_triton(key)):
        from allspark_fast.kernels.channel_attention import kernel  # noqa: PLC0415 triton is optional

        return kernel
    return chunked


@torch.library.custom_op("allspark_fast::softmax_attention", mutates_args=())
def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    key_mean: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale · queryᵀ key) valueᵀ and the log-sum-exp of its rows, (B, H, 1, Cq); see ``chunked.forward``.

    The query holds numbers of the key's dtype, but comes in the accumulation dtype, so that its gradient does.
    """
    with torch.cuda.device_of(query):
        return _implementation(key, backend).forward(query, key, value, scale, key_mean, column_mask, dropout_p, seed)


@_softmax_attention.register_fake
def _(query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((*query.shape[:2], 1, query.shape[3]))
    return query.new_empty(query.shape, dtype=key.dtype), lse


@torch.library.custom_op("allspark_fast::softmax_attention_backward", mutates_args=())
def _softmax_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    key_mean: Tensor,
    output: Tensor,
    lse: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        implementation = _implementation(key, backend)
        return implementation.backward(
            grad, query, key, value, scale, key_mean, output, lse, column_mask, dropout_p, seed
        )


@_softmax_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value, grad_scale = (x.new_empty(x.shape) for x in (query, key, value, scale))
    return grad_query, grad_key, grad_value, grad_scale


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, column_mask, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output, column_mask, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    grads = _softmax_attention_backward(grad, *saved, ctx.dropout_p, seed, ctx.backend)
    return *grads, None, None, None, None, None


_softmax_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _library_attention(query: Tensor, key: Tensor, value: Tensor, column_mask: Tensor | None, backend: str) -> Tensor:
    """Softmax attention by somebody else's kernel, which sees channels as sequence and tokens as head dim."""
    batch, _, tokens, _ = query.shape
    if column_mask is not None:
        # One more feature adds -30000 to the logits of masked columns, where a bias would be a (Cq, L) map.
        bias = torch.where(column_mask, 0.0, _MASKED_LOGIT).to(key.dtype)
        query = torch.cat([query, torch.ones_like(query[:, :, :1])], 2)
        key = torch.cat([key, bias.expand(*key.shape[:2], 1, -1)], 2)
        value = value.masked_fill(~column_mask, 0)
    padded = math.ceil(query.shape[2] / _LIBRARY_ALIGNMENT) * _LIBRARY_ALIGNMENT
    sequences = [pad(x.mT, (0, padded - x.shape[2])).contiguous() for x in (query, key, value)]
    sequences = [x.expand(batch, -1, -1, -1) for x in sequences]
    attend = _sdpa if backend == "sdpa" else _xformers
    output = attend(*sequences)[..., :tokens].mT
    return output if column_mask is None else output * column_mask.any()


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    kernel = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(query, key, value, scale=1.0)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # noqa: PLC0415 an optional package

    # xformers puts the sequence before the heads.
    output = memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=1.0)
    return output.transpose(1, 2)


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_mask: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
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
    check_number("eps", eps)
    if not eps > 0:  # at 0 a constant map is 0/0
        raise ValueError(f"eps must be above 0, got {eps}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None:
        check_tensor("seed", seed, "()", (torch.int64,), like=query)
    check_choice("backend", backend, _BACKENDS)
    if backend in _LIBRARY_BACKENDS and dropout_p > 0:
        raise ValueError(
            f"backend {backend!r} cannot apply the hashed dropout mask: dropout_p must be 0, got {dropout_p}"
        )
    if backend == "triton":
        check_triton_runs("query", query)
    if backend == "xformers" and not query.is_cuda:
        raise ValueError(f"backend 'xformers' has CUDA kernels only, query is on {query.device}")
