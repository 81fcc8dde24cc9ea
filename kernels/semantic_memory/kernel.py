"""The memory's enqueue in Triton: one program for each class and tile of tokens writes the channels of that class.

No two programs touch the same address, so the result does not depend on the order in which they run. Slots are the
fastest axis of the memory as stored, [N, K, S], and of a tile, so writes are coalesced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = {"BLOCK_N": 16, "BLOCK_E": 128}


@triton.jit
def _enqueue_kernel(
    features, channel_class, pointers, queue, queue_ptr, sizes, strides, queue_strides, stride_ptr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Features (B, N, C), classes (E,) of all channels, pointers (K,), a copy of queue_ptr; sizes are (N, C, S, E)."""
    N, C, S, E = sizes
    stride_b, stride_n, stride_c = strides
    stride_k, stride_s, stride_queue_n = queue_strides
    i_n, i_k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    arrivals = 0
    for e in range(0, E, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        arrivals += tl.sum((tl.load(channel_class + o_e, mask=o_e < E, other=-1) == i_k).to(tl.int32), 0)
    # A pointer outside [0, S) must not write there; the remainder of a negative one is negative.
    first = (tl.load(pointers + i_k) % S + S) % S
    if i_n == 0:
        tl.store(queue_ptr + i_k * stride_ptr, (first + arrivals) % S)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    p_features = features + o_n * stride_n
    p_queue = queue + i_k * stride_k + o_n * stride_queue_n
    rank_before = 0
    for e in range(0, E, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_member = tl.load(channel_class + o_e, mask=o_e < E, other=-1) == i_k
        b_rank = rank_before + tl.cumsum(m_member.to(tl.int32), 0) - 1
        rank_before += tl.sum(m_member.to(tl.int32), 0)
        # Of more than S arrivals the last S stay, so no slot is written twice.
        m_write = (o_n < N) & (m_member & (b_rank >= arrivals - S))[None, :]  # [BN, BE]
        o_features = (o_e // C).to(tl.int64) * stride_b + (o_e % C).to(tl.int64) * stride_c
        b_channel = tl.load(p_features + o_features[None, :], mask=m_write, other=0.0).to(tl.float32)
        o_slot = (first + b_rank) % S * stride_s
        tl.store(p_queue + o_slot[None, :], b_channel.to(queue.dtype.element_ty), mask=m_write)


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Compute ``reference.semantic_memory_enqueue`` for float16, bfloat16 and float32."""
    classes, slots, tokens = queue.shape
    tensors = features, channel_class.contiguous(), queue_ptr.clone(memory_format=torch.contiguous_format)
    sizes = tokens, features.shape[2], slots, channel_class.numel()
    scalars = sizes, features.stride(), queue.stride(), queue_ptr.stride(0)
    _enqueue_kernel[triton.cdiv(tokens, _TILE["BLOCK_N"]), classes](*tensors, queue, queue_ptr, *scalars, **_TILE)
