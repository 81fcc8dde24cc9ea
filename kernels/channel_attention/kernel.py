"""Softmax attention in Triton: forward and backward for any N, by a split softmax over chunks of key channels.

The head dim of this attention is the number of tokens N, 289 to 1369: too wide for the registers of a one-pass kernel,
except up to about 300 on recent devices (one_pass.py, forward only). So the map is made in chunks of columns that stay
in the L2 cache, by plain matrix products with an epilogue:

    forward, for each chunk     _probability_kernel   P = exp(qᵀk - row maximum of the tile), and each tile's row sums
                                _merge_kernel         merges softmax(chunk) vᵀ into the output and lse so far
    backward, for each chunk    _gradient_kernel      P and dS of the chunk, from the lse; then library products:
                                                      dV = dO P, dK = Q dS, dQ += K dSᵀ

Rows are query channels, columns are key channels, a map is one (sample, head); samples that share their keys are rows
of one map. All operands are (maps, N, channels) with channels contiguous, as a linear layer leaves them: an odd N is
then the slow axis and costs no alignment. docs/kernels.md has the derivation and counts FLOPs and bytes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from allspark_fast.kernels.channel_attention import one_pass
from allspark_fast.kernels.channel_attention.configs import (
    OnePassTile,
    SplitTiles,
    Tile,
    forward_tiles,
    gradient_tiles,
)
from allspark_fast.kernels.channel_attention.maps import LOG2E, Maps, keep_mask, pointers, unmasked_columns
from allspark_fast.kernels.tuning import fastest

# A chunk has as many columns as fit into this many bytes, within the two limits. Chunks of 16 MiB would stay in the L2
# cache, but backward on an H200 took 0.85 of their time with 64: fewer launches, and larger library products.
WORKSPACE_BYTES = 64 * 2**20
MIN_COLUMNS = 1024
MAX_COLUMNS = 8192

_Tiles = TypeVar("_Tiles")
_LN2 = 0.6931471805599453
# They vary from launch to launch and would each compile anew; a chunk's start is always a multiple of 16, and has to be
# known as one for vector loads.
_UNSPECIALIZED = ["tiles", "threshold", "keep_scale"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _probability_kernel(
    query,  # (maps, N, R)
    key,  # (maps, N, L)
    scale,  # (maps, R)
    column_mask,  # (L,) or None
    seed,  # () or None: no dropout
    probability,  # (maps, R, W), of the columns from start
    tile_maximum,  # (maps, tiles, R), in units of log2
    tile_sum,  # (maps, tiles, R), before dropout
    N,
    C,
    R,
    L,
    W,
    start,
    threshold,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_r, i_l, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_l = start + o_w
    m_r, m_l = o_r < R, o_l < L

    p_query = pointers(query, i_map, N, R, o_n[None, :], o_r[:, None])
    p_key = pointers(key, i_map, N, L, o_n[:, None], o_l[None, :])
    b_logits = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for n in range(0, N, BLOCK_N):
        m_n = n + o_n < N
        b_query = tl.load(p_query, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
        b_key = tl.load(p_key, mask=m_n[:, None] & m_l[None, :], other=0.0)  # [BN, BL]
        b_logits = tl.dot(b_query, b_key, b_logits, input_precision="ieee")
        p_query += BLOCK_N * R
        p_key += BLOCK_N * L

    b_scale = tl.load(scale + i_map * R + o_r, mask=m_r, other=0.0) * LOG2E
    b_logits = tl.where(unmasked_columns(column_mask, o_l, L)[None, :], b_logits * b_scale[:, None], float("-inf"))
    b_maximum = tl.max(b_logits, 1)  # [BR]
    # A row without a column would give exp2(-inf + inf).
    b_probability = tl.exp2(b_logits - tl.where(b_maximum == float("-inf"), 0.0, b_maximum)[:, None])
    o_statistic = (i_map * tl.num_programs(1) + i_l) * R + o_r
    tl.store(tile_maximum + o_statistic, b_maximum, mask=m_r)
    tl.store(tile_sum + o_statistic, tl.sum(b_probability, 1), mask=m_r)
    if seed is not None:
        b_probability = tl.where(keep_mask(seed, i_map, o_r, o_l, C, threshold), b_probability, 0.0)
    p_probability = probability + (i_map * R + o_r[:, None]) * W + o_w[None, :]
    tl.store(p_probability, b_probability.to(probability.dtype.element_ty), mask=m_r[:, None])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _merge_kernel(
    probability,  # (maps, R, W)
    tile_maximum,  # (maps, tiles, R)
    tile_sum,  # (maps, tiles, R)
    value,  # (maps, N, L)
    output,  # (maps, N, R) float32: of the chunks before, and with this one
    lse_before,  # (maps, R), in units of log2
    lse_after,  # (maps, R)
    N,
    R,
    L,
    W,
    start,
    tiles,
    keep_scale,
    MAX_TILES: tl.constexpr,
    TILE_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_n, i_r, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = tl.arange(0, BLOCK_L)
    o_t = tl.arange(0, MAX_TILES)
    m_n, m_r = o_n < N, o_r < R

    # Softmax over the chunks before, known by their lse, and the tiles of this one.
    o_statistic = (i_map * tiles + o_t[:, None]) * R + o_r[None, :]
    m_statistic = (o_t < tiles)[:, None] & m_r[None, :]
    b_tile_maximum = tl.load(tile_maximum + o_statistic, mask=m_statistic, other=float("-inf"))  # [MAX_TILES, BR]
    b_tile_sum = tl.load(tile_sum + o_statistic, mask=m_statistic, other=0.0)
    b_before = tl.load(lse_before + i_map * R + o_r, mask=m_r, other=float("-inf"))
    b_maximum = tl.maximum(b_before, tl.max(b_tile_maximum, 0))  # [BR]
    b_maximum = tl.where(b_maximum == float("-inf"), 0.0, b_maximum)
    b_rescale = tl.exp2(b_before - b_maximum)
    b_total = b_rescale + tl.sum(b_tile_sum * tl.exp2(b_tile_maximum - b_maximum[None, :]), 0)

    p_probability = probability + (i_map * R + o_r[:, None]) * W + o_w[None, :]
    p_value = pointers(value, i_map, N, L, o_n[None, :], (start + o_w)[:, None])
    b_output = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for w in range(0, tiles * TILE_L, BLOCK_L):
        b_probability = tl.load(p_probability, mask=m_r[:, None], other=0.0)  # [BR, BL]
        b_value = tl.load(p_value, mask=(start + w + o_w < L)[:, None] & m_n[None, :], other=0.0)  # [BL, BN]
        p_tile_maximum = tile_maximum + (i_map * tiles + w // TILE_L) * R + o_r
        b_relative = tl.load(p_tile_maximum, mask=m_r, other=float("-inf")) - b_maximum
        b_probability = b_probability * tl.exp2(b_relative)[:, None]
        b_output = tl.dot(b_probability.to(b_value.dtype), b_value, b_output, input_precision="ieee")
        p_probability += BLOCK_L
        p_value += BLOCK_L

    b_divisor = tl.where(b_total == 0.0, 1.0, b_total)
    p_output = pointers(output, i_map, N, R, o_n[None, :], o_r[:, None])  # [BR, BN]
    m_output = m_n[None, :] & m_r[:, None]
    b_output_before = tl.load(p_output, mask=m_output, other=0.0)
    b_output = (b_output * keep_scale + b_output_before * b_rescale[:, None]) / b_divisor[:, None]
    tl.store(p_output, b_output, mask=m_output)
    b_lse = tl.where(b_total == 0.0, float("-inf"), b_maximum + tl.log2(b_divisor))
    tl.store(lse_after + i_map * R + o_r, b_lse, mask=m_r & (i_n == 0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _gradient_kernel(
    query,  # (maps, N, R)
    key,  # (maps, N, L)
    value,  # (maps, N, L)
    scale,  # (maps, R)
    grad_output,  # (maps, N, R)
    lse,  # (maps, R)
    delta,  # (maps, R): row sums of P dP
    column_mask,  # (L,) or None
    seed,  # () or None: no dropout
    probability,  # (maps, R, W), of the columns from start, after dropout
    grad_logits,  # (maps, R, W), of the scaled logits
    N,
    C,
    R,
    L,
    W,
    start,
    threshold,
    keep_scale,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_r, i_l, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_l = start + o_w
    m_r, m_l = o_r < R, o_l < L

    p_query = pointers(query, i_map, N, R, o_n[None, :], o_r[:, None])
    p_key = pointers(key, i_map, N, L, o_n[:, None], o_l[None, :])
    p_grad_output = pointers(grad_output, i_map, N, R, o_n[None, :], o_r[:, None])
    p_value = pointers(value, i_map, N, L, o_n[:, None], o_l[None, :])
    b_logits = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    b_grad = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for n in range(0, N, BLOCK_N):
        m_n = n + o_n < N
        b_query = tl.load(p_query, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
        b_key = tl.load(p_key, mask=m_n[:, None] & m_l[None, :], other=0.0)  # [BN, BL]
        b_grad_output = tl.load(p_grad_output, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_value = tl.load(p_value, mask=m_n[:, None] & m_l[None, :], other=0.0)
        b_logits = tl.dot(b_query, b_key, b_logits, input_precision="ieee")
        b_grad = tl.dot(b_grad_output, b_value, b_grad, input_precision="ieee")
        p_query += BLOCK_N * R
        p_key += BLOCK_N * L
        p_grad_output += BLOCK_N * R
        p_value += BLOCK_N * L

    b_scale = tl.load(scale + i_map * R + o_r, mask=m_r, other=0.0)
    b_lse = tl.load(lse + i_map * R + o_r, mask=m_r, other=0.0)
    b_delta = tl.load(delta + i_map * R + o_r, mask=m_r, other=0.0)
    # Masked columns, and so every column of a row whose lse is -inf, have P = 0.
    m_logits = unmasked_columns(column_mask, o_l, L)[None, :]
    b_probability = tl.where(m_logits, tl.exp2((b_logits * b_scale[:, None] - b_lse[:, None]) * LOG2E), 0.0)
    b_dropout = keep_scale
    if seed is not None:
        b_dropout = tl.where(keep_mask(seed, i_map, o_r, o_l, C, threshold), keep_scale, 0.0)
    b_grad_logits = b_probability * (b_grad * b_dropout - b_delta[:, None])
    o_workspace = (i_map * R + o_r[:, None]) * W + o_w[None, :]
    tl.store(probability + o_workspace, (b_probability * b_dropout).to(probability.dtype.element_ty), mask=m_r[:, None])
    tl.store(grad_logits + o_workspace, b_grad_logits.to(grad_logits.dtype.element_ty), mask=m_r[:, None])


def _workspaces(maps: Maps, count: int, tile_columns: int) -> Tensor:
    """Room for ``count`` matrices over one chunk of columns, (count, maps, rows, W)."""
    number, _, rows = maps.query.shape
    fitting = WORKSPACE_BYTES // (number * rows * maps.query.element_size())
    columns = min(max(fitting, MIN_COLUMNS), MAX_COLUMNS)
    tiles = min(columns // tile_columns, triton.cdiv(maps.key.shape[2], tile_columns))
    return maps.query.new_empty((count, number, rows, tiles * tile_columns))


def _chunks(columns: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def _forward(maps: Maps, tiles: OnePassTile | SplitTiles) -> tuple[Tensor, Tensor]:
    """Output (maps, N, R) and lse (maps, R), in units of log2, in float32."""
    return one_pass.forward(maps, tiles) if isinstance(tiles, OnePassTile) else _split_forward(maps, tiles)


def _split_forward(maps: Maps, tiles: SplitTiles) -> tuple[Tensor, Tensor]:
    """Output (maps, N, R) and lse (maps, R), in units of log2, in float32."""
    count, tokens, rows = maps.query.shape
    columns = maps.key.shape[2]
    tile, merge_tile = tiles
    (probability,) = _workspaces(maps, 1, tile.columns)
    width = probability.shape[-1]
    output = torch.zeros_like(maps.query, dtype=torch.float32)
    tile_maximum, tile_sum = output.new_empty((2, count, width // tile.columns, rows))
    lse = output.new_full((count, rows), -torch.inf)
    for chunk in _chunks(columns, width):
        chunk_tiles = triton.cdiv(chunk.stop - chunk.start, tile.columns)
        _probability_kernel[triton.cdiv(rows, tile.rows), chunk_tiles, count](
            maps.query,
            maps.key,
            maps.scale,
            maps.column_mask,
            maps.seed,
            probability,
            tile_maximum,
            tile_sum,
            tokens,
            maps.channels,
            rows,
            columns,
            width,
            chunk.start,
            maps.threshold,
            **tile.options(),
        )
        lse_before, lse = lse, torch.empty_like(lse)
        _merge_kernel[triton.cdiv(tokens, merge_tile.tokens), triton.cdiv(rows, merge_tile.rows), count](
            probability,
            tile_maximum,
            tile_sum,
            maps.value,
            output,
            lse_before,
            lse,
            tokens,
            rows,
            columns,
            width,
            chunk.start,
            chunk_tiles,
            maps.keep_scale,
            MAX_TILES=MAX_COLUMNS // tile.columns,
            TILE_L=tile.columns,
            **merge_tile.options(),
        )
    return output, lse


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    key_mean: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``chunked.forward``, for float16, bfloat16 and float32."""
    if query.numel() == 0:
        return torch.empty_like(query, dtype=key.dtype), query.new_empty((*query.shape[:2], 1, query.shape[3]))
    maps = Maps(query, key, value, scale, key_mean, column_mask, dropout_p, seed)
    choices = forward_tiles(key.device, key.dtype, key.shape[2])
    if not one_pass.can_address(maps):
        choices = [tiles for tiles in choices if isinstance(tiles, SplitTiles)]
    output, lse = _forward(maps, _select("forward", maps, choices, lambda tiles: _forward(maps, tiles)))
    return maps.unpack(output, key.dtype), maps.unpack(lse[:, None] * _LN2, torch.float32)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``chunked.backward``, for float16, bfloat16 and float32."""
    if query.numel() == 0:
        return torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value), torch.zeros_like(scale)
    maps = Maps(query, key, value, scale, key_mean, column_mask, dropout_p, seed)
    choices = gradient_tiles(key.device, key.dtype)
    differentiate = functools.partial(_backward, maps, grad, output, lse)
    grad_query, grad_key, grad_value = differentiate(_select("backward", maps, choices, differentiate))
    grad_scale = (grad_query * query).sum((-2, -1), keepdim=True)
    return grad_query * scale, grad_key.view(key.shape), grad_value.view(value.shape), grad_scale


def _backward(maps: Maps, grad: Tensor, output: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled query (B, H, N, Cq), float32, and of key and value (maps, N, L)."""
    count, tokens, rows = maps.query.shape
    key_columns = maps.key.shape[2]
    probability, grad_logits = _workspaces(maps, 2, tile.columns)
    width = probability.shape[-1]
    grad_output = maps.pack(grad)
    # Row sums of P dP, with or without dropout (FlashAttention-2, sec. 3.1).
    delta = maps.pack((grad.float() * output).sum(2, keepdim=True))
    row_lse = maps.pack(lse)
    # It is rounded, as the centered keys below are, but enters no exponential.
    scaled_query = (maps.query * maps.scale).to(maps.key.dtype)
    grad_scaled = torch.zeros_like(maps.query, dtype=torch.float32)
    grad_key, grad_value = torch.empty_like(maps.key), torch.empty_like(maps.value)
    for chunk in _chunks(key_columns, width):
        columns = chunk.stop - chunk.start
        _gradient_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns), count](
            maps.query,
            maps.key,
            maps.value,
            maps.scale,
            grad_output,
            row_lse,
            delta,
            maps.column_mask,
            maps.seed,
            probability,
            grad_logits,
            tokens,
            maps.channels,
            rows,
            key_columns,
            width,
            chunk.start,
            maps.threshold,
            maps.keep_scale,
            **tile.options(),
        )
        chunk_grad_logits = grad_logits[..., :columns]
        torch.bmm(grad_output, probability[..., :columns], out=grad_value[..., chunk])
        torch.bmm(scaled_query, chunk_grad_logits, out=grad_key[..., chunk])
        # The product rounds to the input's dtype, the sum over chunks does not.
        grad_scaled += torch.bmm(maps.centered_keys(chunk), chunk_grad_logits.mT)
    return maps.unpack(grad_scaled, torch.float32), grad_key, grad_value


def _select(name: str, maps: Maps, choices: Sequence[_Tiles], run: Callable[[_Tiles], object]) -> _Tiles:
    """The fastest tiles for maps of about this size: N, rows and columns up to the next power of two."""
    _, tokens, rows = maps.query.shape
    sizes = (f"{letter}<2^{x.bit_length()}" for letter, x in (("N", tokens), ("R", rows), ("L", maps.key.shape[2])))
    dropout = "dropout" if maps.seed is not None else "no dropout"
    problem = f"channel_attention {name}, {maps.key.dtype}, {', '.join(sizes)}, {dropout}"
    return fastest(problem, choices, run, maps.key.device)
