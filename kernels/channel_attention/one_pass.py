"""The one-pass forward of channel attention in Triton, where N accumulators for each row fit into registers.

FlashAttention with a head dim of N: a program keeps the query and the output of its rows and walks over the columns,
so no map ever leaves the SM. Tensor descriptors (TMA, sm_90 and later) load keys and values without address registers
and fill tokens beyond N with zeros; the tokens are covered by a few chunks that are powers of two. A training step has
fewer row tiles than a GPU has SMs, so the columns are cut into parts, which ``_combine_kernel`` merges by their lse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allspark_fast.kernels.channel_attention.configs import OnePassTile
from allspark_fast.kernels.channel_attention.maps import LOG2E, Maps, keep_mask, pointers, unmasked_columns

# Programs that fill a GPU: two for each of the 132 or 148 SMs of an H100 or B200.
_PROGRAMS = 264
_MAX_PARTS = 8
_MAX_CHUNKS = 3
_COMBINE_ROWS = 128
_COMBINE_TOKENS = 16


@triton.jit(do_not_specialize=["threshold", "keep_scale"])
def _one_pass_kernel(
    query,  # (maps, N, R)
    key_0,  # descriptors of (maps, N, L), one for each chunk of tokens; None beyond the last chunk
    key_1,  # (Triton 3.6 cannot launch a tuple of descriptors)
    key_2,
    value_0,  # descriptors of (maps, N, L)
    value_1,
    value_2,
    scale,  # (maps, R)
    column_mask,  # (L,) or None
    seed,  # () or None: no dropout
    output,  # (parts, maps, N, R) float32
    lse,  # (parts, maps, R), in units of log2
    N,
    C,
    R,
    L,
    part_columns,
    threshold,
    keep_scale,
    CHUNKS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i_r, i_part, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key, value = (key_0, key_1, key_2), (value_0, value_1, value_2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_query, b_output = (), ()
    for c in tl.static_range(len(CHUNKS)):
        o_n = tl.constexpr(OFFSETS[c]) + tl.arange(0, tl.constexpr(CHUNKS[c]))
        p_query = pointers(query, i_map.to(tl.int64), N, R, o_n[None, :], o_r[:, None])
        b_query = b_query + (tl.load(p_query, mask=m_r[:, None] & (o_n < N)[None, :], other=0.0),)  # [BR, BN]
        b_output = b_output + (tl.zeros([BLOCK_R, tl.constexpr(CHUNKS[c])], tl.float32),)
    b_scale = tl.load(scale + i_map.to(tl.int64) * R + o_r, mask=m_r, other=0.0) * LOG2E
    b_maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_R], tl.float32)

    start = i_part * part_columns
    for i_l in range(start, min(start + part_columns, L), BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        b_logits = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
        for c in tl.static_range(len(CHUNKS)):
            b_key = key[c].load([i_map, tl.constexpr(OFFSETS[c]), i_l]).reshape(tl.constexpr(CHUNKS[c]), BLOCK_L)
            b_logits = tl.dot(b_query[c], b_key, b_logits, input_precision="ieee")
        b_logits = tl.where(unmasked_columns(column_mask, o_l, L)[None, :], b_logits * b_scale[:, None], float("-inf"))
        b_new_maximum = tl.maximum(b_maximum, tl.max(b_logits, 1))
        b_finite_maximum = tl.where(b_new_maximum == float("-inf"), 0.0, b_new_maximum)
        b_probability = tl.exp2(b_logits - b_finite_maximum[:, None])
        b_rescale = tl.exp2(b_maximum - b_finite_maximum)
        b_total = b_total * b_rescale + tl.sum(b_probability, 1)
        b_maximum = b_new_maximum
        if seed is not None:
            b_probability = tl.where(keep_mask(seed, i_map, o_r, o_l, C, threshold), b_probability, 0.0)
        b_probability = b_probability.to(query.dtype.element_ty)
        b_new_output = ()
        for c in tl.static_range(len(CHUNKS)):
            b_value = value[c].load([i_map, tl.constexpr(OFFSETS[c]), i_l]).reshape(tl.constexpr(CHUNKS[c]), BLOCK_L)
            b_rescaled = b_output[c] * b_rescale[:, None]
            b_sum = tl.dot(b_probability, tl.trans(b_value), b_rescaled, input_precision="ieee")
            b_new_output = b_new_output + (b_sum,)
        b_output = b_new_output

    b_divisor = tl.where(b_total == 0.0, 1.0, b_total)
    i_output = i_part.to(tl.int64) * tl.num_programs(2) + i_map
    for c in tl.static_range(len(CHUNKS)):
        o_n = tl.constexpr(OFFSETS[c]) + tl.arange(0, tl.constexpr(CHUNKS[c]))
        p_output = pointers(output, i_output, N, R, o_n[None, :], o_r[:, None])
        b_normalized = b_output[c] * (keep_scale / b_divisor)[:, None]
        tl.store(p_output, b_normalized, mask=m_r[:, None] & (o_n < N)[None, :])
    # The maximum of a row without a column is -inf, and so is its lse.
    tl.store(lse + i_output * R + o_r, b_maximum + tl.log2(b_divisor), mask=m_r)


@triton.jit
def _combine_kernel(
    part_output,  # (parts, maps, N, R) float32
    part_lse,  # (parts, maps, R)
    output,  # (maps, N, R) float32
    lse,  # (maps, R)
    N,
    R,
    parts,
    MAX_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_r, i_n, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    maps = tl.num_programs(2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_part = tl.arange(0, MAX_PARTS)[:, None]
    m_r = o_r < R
    m_output = (o_n < N)[:, None] & m_r[None, :]
    p_lse = part_lse + (o_part * maps + i_map) * R + o_r[None, :]
    b_lse = tl.load(p_lse, mask=(o_part < parts) & m_r[None, :], other=float("-inf"))  # [MAX_PARTS, BR]
    b_maximum = tl.max(b_lse, 0)
    b_maximum = tl.where(b_maximum == float("-inf"), 0.0, b_maximum)
    b_total = tl.sum(tl.exp2(b_lse - b_maximum[None, :]), 0)
    b_divisor = tl.where(b_total == 0.0, 1.0, b_total)
    b_output = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    i_part = i_map
    for _ in range(parts):
        b_weight = tl.exp2(tl.load(part_lse + i_part * R + o_r, mask=m_r, other=float("-inf")) - b_maximum) / b_divisor
        p_part = pointers(part_output, i_part, N, R, o_n[:, None], o_r[None, :])
        b_output += b_weight[None, :] * tl.load(p_part, mask=m_output, other=0.0)
        i_part += maps
    tl.store(pointers(output, i_map, N, R, o_n[:, None], o_r[None, :]), b_output, mask=m_output)
    b_lse = tl.where(b_total == 0.0, float("-inf"), b_maximum + tl.log2(b_divisor))
    tl.store(lse + i_map * R + o_r, b_lse, mask=m_r & (i_n == 0))


def can_address(maps: Maps) -> bool:
    """Whether descriptors can address these maps: rows of 16 bytes, aligned."""
    aligned = all(x.storage_offset() * x.element_size() % 16 == 0 for x in (maps.key, maps.value))
    return aligned and maps.key.shape[2] * maps.key.element_size() % 16 == 0


def _descriptors(x: Tensor, tile: OnePassTile) -> list[TensorDescriptor | None]:
    """Descriptors of the chunks of ``x`` (maps, N, L), then None for the chunks that the tile does without."""
    descriptors = [TensorDescriptor.from_tensor(x, [1, chunk, tile.columns]) for chunk in tile.chunks]
    return descriptors + [None] * (_MAX_CHUNKS - len(descriptors))


def forward(maps: Maps, tile: OnePassTile) -> tuple[Tensor, Tensor]:
    """Output (maps, N, R) and lse (maps, R), in units of log2, in float32."""
    count, tokens, rows = maps.query.shape
    columns = maps.key.shape[2]
    row_tiles = triton.cdiv(rows, tile.rows)
    parts = min(max(_PROGRAMS // (row_tiles * count), 1), _MAX_PARTS)
    part_columns = triton.cdiv(triton.cdiv(columns, parts), tile.columns) * tile.columns
    parts = triton.cdiv(columns, part_columns)
    part_output = maps.query.new_empty((parts, count, tokens, rows), dtype=torch.float32)
    part_lse = part_output.new_empty((parts, count, rows))
    _one_pass_kernel[row_tiles, parts, count](
        maps.query,
        *_descriptors(maps.key, tile),
        *_descriptors(maps.value, tile),
        maps.scale,
        maps.column_mask,
        maps.seed,
        part_output,
        part_lse,
        tokens,
        maps.channels,
        rows,
        columns,
        part_columns,
        maps.threshold,
        maps.keep_scale,
        CHUNKS=tile.chunks,
        OFFSETS=tuple(sum(tile.chunks[:i]) for i in range(len(tile.chunks))),
        BLOCK_R=tile.rows,
        BLOCK_L=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if parts == 1:
        return part_output[0], part_lse[0]
    output, lse = torch.empty_like(part_output[0]), torch.empty_like(part_lse[0])
    _combine_kernel[triton.cdiv(rows, _COMBINE_ROWS), triton.cdiv(tokens, _COMBINE_TOKENS), count](
        part_output,
        part_lse,
        output,
        lse,
        tokens,
        rows,
        parts,
        MAX_PARTS=_MAX_PARTS,
        BLOCK_R=_COMBINE_ROWS,
        BLOCK_N=_COMBINE_TOKENS,
    )
    return output, lse
