"""Channel semantic grouping and the memory's enqueue in Triton.

Grouping is a product of class maps and features with an argmax in the epilogue. The enqueue takes two launches, so that
the result does not depend on the order in which programs run:

    _route_kernel   one program for each class: the channel for each of its slots, and the new pointer
    _write_kernel   one program for each tile of slots and tokens: copies those channels

Slots are the fastest axis of the memory as stored, [N, K, S], and of a tile, so writes are coalesced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# More classes a tile spill registers.
_GROUPING_TILE = {"BLOCK_K": 32, "BLOCK_C": 32, "BLOCK_N": 16}
_WRITE_TILE = {"BLOCK_N": 16, "BLOCK_S": 64}


@triton.jit
def _grouping_kernel(
    features,  # (B, N, C)
    class_map,  # (B, K, N)
    channel_class,  # (B, C) int64
    finite,  # (B, tiles) bool: whether all inputs of a program are finite
    N,
    C,
    K,
    stride_features_b,
    stride_features_n,
    stride_features_c,
    stride_map_b,
    stride_map_k,
    stride_map_n,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_c, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_features = features + i_b * stride_features_b + o_c[None, :].to(tl.int64) * stride_features_c
    b_best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    b_class = tl.zeros([BLOCK_C], tl.int64)
    b_finite = tl.full([BLOCK_C], 1, tl.int32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        p_map = class_map + i_b * stride_map_b + o_k[:, None].to(tl.int64) * stride_map_k
        b_similarity = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        b_norm = tl.zeros([BLOCK_K], tl.float32)  # squared
        for n in range(0, N, BLOCK_N):
            o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_n = o_n < N
            b_map = tl.load(p_map + o_n[None, :] * stride_map_n, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_map = b_map.to(tl.float32)  # [BK, BN]
            p_tokens = p_features + o_n[:, None] * stride_features_n
            b_features = tl.load(p_tokens, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BN, BC]
            b_similarity = tl.dot(b_map, b_features, b_similarity, input_precision="ieee")
            b_norm += tl.sum(b_map * b_map, 1)
            # x - x is 0 for finite x and NaN otherwise.
            b_finite &= tl.min((b_features - b_features == 0.0).to(tl.int32), 0)
            b_finite &= tl.min(tl.min((b_map - b_map == 0.0).to(tl.int32), 1), 0)
        # A channel's own norm cannot change its argmax; 1e-12 is the eps of torch.nn.functional.normalize.
        b_similarity = b_similarity / tl.maximum(tl.sqrt(b_norm), 1e-12)[:, None]
        b_similarity = tl.where(m_k[:, None], b_similarity, float("-inf"))
        b_maximum = tl.max(b_similarity, 0)
        b_class = tl.where(b_maximum > b_best, k + tl.argmax(b_similarity, 0), b_class)
        b_best = tl.maximum(b_best, b_maximum)
    tl.store(channel_class + i_b * C + o_c, b_class, mask=m_c)
    tl.store(finite + i_b * tl.num_programs(0) + i_c, tl.min(b_finite, 0) != 0)


@triton.jit
def _route_kernel(
    channel_class,  # (E,), channels of all images in order
    queue_ptr,  # (K,) int64
    source,  # (K, S) int32, filled with -1: the channel for a slot
    E,
    S,
    stride_ptr,
    BLOCK_E: tl.constexpr,
):
    i_k = tl.program_id(0).to(tl.int64)
    arrivals = 0
    for e in range(0, E, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        arrivals += tl.sum((tl.load(channel_class + o_e, mask=o_e < E, other=-1) == i_k).to(tl.int32), 0)
    # A pointer outside [0, S) must not write there; the remainder of a negative one is negative.
    first = (tl.load(queue_ptr + i_k * stride_ptr) % S + S) % S
    rank_before = 0
    for e in range(0, E, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_member = tl.load(channel_class + o_e, mask=o_e < E, other=-1) == i_k
        b_rank = rank_before + tl.cumsum(m_member.to(tl.int32), 0) - 1
        # Of more than S arrivals the last S stay, so no slot is written twice.
        m_kept = m_member & (b_rank >= arrivals - S)
        tl.store(source + i_k * S + (first + b_rank) % S, o_e, mask=m_kept)
        rank_before += tl.sum(m_member.to(tl.int32), 0)
    tl.store(queue_ptr + i_k * stride_ptr, (first + arrivals) % S)


@triton.jit
def _write_kernel(
    features,  # (B, N, C)
    source,  # (K, S) int32
    queue,  # (K, S, N)
    N,
    C,
    S,
    stride_features_b,
    stride_features_n,
    stride_features_c,
    stride_queue_k,
    stride_queue_s,
    stride_queue_n,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_s, i_n, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    b_source = tl.load(source + i_k * S + o_s, mask=o_s < S, other=-1).to(tl.int64)
    m_write = (o_n < N) & (b_source >= 0)[None, :]  # [BN, BS]
    o_features = (b_source // C) * stride_features_b + (b_source % C) * stride_features_c
    b_channel = tl.load(features + o_n * stride_features_n + o_features[None, :], mask=m_write, other=0.0)
    p_queue = queue + i_k * stride_queue_k + o_s[None, :].to(tl.int64) * stride_queue_s + o_n * stride_queue_n
    tl.store(p_queue, b_channel.to(tl.float32).to(queue.dtype.element_ty), mask=m_write)


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Compute ``reference.channel_semantic_grouping`` for float16, bfloat16 and float32."""
    batch, tokens, channels = features.shape
    tiles = triton.cdiv(channels, _GROUPING_TILE["BLOCK_C"])
    channel_class = torch.empty((batch, channels), dtype=torch.int64, device=features.device)
    if channel_class.numel() == 0:
        return channel_class
    finite = torch.empty((batch, tiles), dtype=torch.bool, device=features.device)
    sizes, strides = (tokens, channels, class_map.shape[1]), (*features.stride(), *class_map.stride())
    _grouping_kernel[tiles, batch](features, class_map, channel_class, finite, *sizes, *strides, **_GROUPING_TILE)
    return channel_class.masked_fill_(~finite.all(1, keepdim=True), -1)


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Compute ``reference.semantic_memory_enqueue`` for float16, bfloat16 and float32."""
    classes, slots, tokens = queue.shape
    source = torch.full((classes, slots), -1, dtype=torch.int32, device=queue.device)
    _route_kernel[(classes,)](
        channel_class.contiguous(), queue_ptr, source, channel_class.numel(), slots, queue_ptr.stride(0), BLOCK_E=1024
    )
    grid = triton.cdiv(slots, _WRITE_TILE["BLOCK_S"]), triton.cdiv(tokens, _WRITE_TILE["BLOCK_N"]), classes
    strides = *features.stride(), *queue.stride()
    _write_kernel[grid](features, source, queue, tokens, features.shape[2], slots, *strides, **_WRITE_TILE)
