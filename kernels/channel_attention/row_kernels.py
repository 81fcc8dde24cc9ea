"""Triton kernels over whole rows of the similarity map: what lies between the library's matrix products.

A map is one (sample, head), its rows are query channels and its columns key channels. Samples that share their keys
are rows of one map: row r of R is channel r % C of its sample r // C. Names have the same meaning in all kernels:

    half_key, half_rows     (maps, N, L), (maps, N, R)    key without mean, and query, in half precision; see below
    logits, probability     (maps, R, L)      products of half_rows and half_key, and P in the same memory
    grad                    (maps, R, L)      dP / grad_unit, and dS in the same memory
    parts                   (pieces, maps, N, R) float32: a product over L in pieces
    key_unit, mean, count   (maps, N)         of a key's token: power of two, mean, columns that count (at least 1)
    unit, shift, scale, maximum, squares, rstd, lse, delta, slope, offset    (B, H, C)    a number a row
    sums                    (..., tiles, B, H, C)    row sums of each tile
    column_mask             (L,)              columns that count; None if all do
    seed                    ()                of dropout; None without. Row 0 is row first_row of the hash
    grad_unit               ()                None for 1

Half precision is float16 over powers of two, and for float32 it is float32. Normalized logits are S = rstd (unit ·
product + shift - mean shift) = scale · product + constant of the row, which softmax ignores.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# These vary from call to call, and must not compile anew.
_UNSPECIALIZED = ["threshold", "keep_scale", "range_factor", "pieces", "first_row"]


@triton.jit
def _row_index(i_map, o_r, C, maps):
    """Where rows o_r of a map stand in tensors (B, H, C)."""
    return (i_map + (o_r // C).to(tl.int64) * maps) * C + o_r % C


@triton.jit
def _token_index(i_map, o_n, o_r, N, C, maps):
    """Where tokens o_n of rows o_r stand in tensors (B, H, N, C)."""
    i_sample = i_map + (o_r // C).to(tl.int64) * maps
    return (i_sample[None, :] * N + o_n[:, None]) * C + (o_r % C)[None, :]  # [BN, BR]


@triton.jit
def _counting(column_mask, o_l, L):
    """Which columns exist and are not masked."""
    m_l = o_l < L
    if column_mask is not None:
        m_l &= tl.load(column_mask + o_l, mask=m_l, other=0) != 0
    return m_l  # [BL]


@triton.jit
def _tile(C, R, L, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program's columns, which rows and entries exist, and where its rows, their sums and its entries stand."""
    i_r, i_l, i_map = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    maps = tl.num_programs(2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_row = _row_index(i_map, o_r, C, maps)
    o_entry = (i_map * R + o_r[:, None]) * L + o_l[None, :]  # [BR, BL]
    return o_l, o_r < R, (o_r < R)[:, None] & (o_l < L)[None, :], o_row, i_l * maps * R + o_row, o_entry


@triton.jit
def _inverse_power_of_two(x):
    """2^-e with e the exponent of x > 0, so that their product lies in [1, 2); 1 for zero."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 32), 240)  # so that neither the result nor its inverse overflows
    return tl.where(x > 0.0, ((254 - exponent) << 23).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _multiply(x):
    x = x * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def _lowbias32(x):
    x = _multiply(x ^ (x >> 16))
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, first_row, o_row, o_l, threshold):
    """The entries that survive dropout, as dropout.py has it."""
    b_seed = tl.load(seed)
    stream = _lowbias32(b_seed.to(tl.uint32) ^ _lowbias32((b_seed >> 32).to(tl.uint32)))
    b_row = stream ^ _lowbias32((first_row + o_row).to(tl.uint32))
    b_column = _lowbias32(stream) ^ _lowbias32(o_l.to(tl.uint32))
    x = _multiply(_multiply(b_row ^ (b_row >> 16))[:, None] ^ _multiply(b_column ^ (b_column >> 16))[None, :])
    return x.to(tl.int32, bitcast=True) >= threshold  # [BR, BL]


@triton.jit
def half_key_kernel(key, column_mask, half_key, key_unit, mean, count, L, BLOCK_L: tl.constexpr):
    """One token of (key - mean) / key_unit, which lies within (-2, 2) and is zero at masked columns."""
    i_n = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    b_count = tl.zeros([BLOCK_L], tl.float32)
    b_low = tl.full([BLOCK_L], float("inf"), tl.float32)
    b_high = tl.full([BLOCK_L], float("-inf"), tl.float32)
    for start in range(0, L, BLOCK_L):
        m_l = _counting(column_mask, start + o_l, L)
        b_key = tl.load(key + i_n * L + start + o_l, mask=m_l, other=0.0).to(tl.float32)
        b_sum += b_key
        b_count += tl.where(m_l, 1.0, 0.0)
        b_low = tl.minimum(b_low, tl.where(m_l, b_key, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_l, b_key, float("-inf")))
    columns = tl.maximum(tl.sum(b_count, 0), 1.0)
    b_mean = tl.sum(b_sum, 0) / columns
    inverse = _inverse_power_of_two(tl.maximum(tl.max(b_high, 0) - b_mean, b_mean - tl.min(b_low, 0)))
    tl.store(mean + i_n, b_mean)
    tl.store(count + i_n, columns)
    tl.store(key_unit + i_n, 1.0 / inverse)
    for start in range(0, L, BLOCK_L):
        m_l = start + o_l < L
        b_key = tl.load(key + i_n * L + start + o_l, mask=m_l, other=0.0).to(tl.float32)
        b_key = tl.where(_counting(column_mask, start + o_l, L), (b_key - b_mean) * inverse, 0.0)
        tl.store(half_key + i_n * L + start + o_l, b_key.to(half_key.dtype.element_ty), mask=m_l)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def half_rows_kernel(
    query, key_unit, mean, half_rows, unit, shift, N, C, R, range_factor, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Rows of query · key_unit · range_factor, over a power of two each, and their products with the key's mean."""
    i_r, i_map = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    m_n, m_r = o_n < N, o_r < R
    m = m_n[:, None] & m_r[None, :]
    p_query = query + _token_index(i_map, o_n, o_r, N, C, tl.num_programs(1))
    b_query = tl.load(p_query, mask=m, other=0.0).to(tl.float32)  # [BN, BR]
    b_shift = tl.sum(b_query * tl.load(mean + i_map * N + o_n, mask=m_n, other=0.0)[:, None], 0)
    b_query *= tl.load(key_unit + i_map * N + o_n, mask=m_n, other=0.0)[:, None]
    b_inverse = _inverse_power_of_two(tl.max(tl.abs(b_query), 0)) * range_factor  # [BR]
    b_query = (b_query * b_inverse[None, :]).to(half_rows.dtype.element_ty)
    tl.store(half_rows + (i_map * N + o_n[:, None]) * R + o_r[None, :], b_query, mask=m)
    o_row = _row_index(i_map, o_r, C, tl.num_programs(1))
    tl.store(unit + o_row, 1.0 / b_inverse, mask=m_r)
    tl.store(shift + o_row, b_shift, mask=m_r)


@triton.jit
def row_statistics_kernel(logits, unit, count, maximum, squares, N, C, R, L, BLOCK_L: tl.constexpr):
    """Maximum of one row of products, and mean square of what they stand for; one program each.

    The row sums to zero, and masked columns are zero: they change neither.
    """
    i_r, i_map = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    b_maximum = tl.zeros([BLOCK_L], tl.float32)
    b_squares = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, L, BLOCK_L):
        p_logits = logits + (i_map * R + i_r) * L + start + o_l
        b_logits = tl.load(p_logits, mask=start + o_l < L, other=0.0).to(tl.float32)
        b_maximum = tl.maximum(b_maximum, b_logits)
        b_squares += b_logits * b_logits
    o_row = _row_index(i_map, i_r, C, tl.num_programs(1))
    row_unit = tl.load(unit + o_row)
    tl.store(maximum + o_row, tl.max(b_maximum, 0))
    tl.store(squares + o_row, tl.sum(b_squares, 0) * row_unit * row_unit / tl.load(count + i_map * N))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_kernel(
    probability, logits, scale, maximum, sums, column_mask, seed, first_row, threshold, C, R, L,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """P = exp2(normalized logits - maximum) after dropout, and the row sums of a tile before it."""
    o_l, m_r, m, o_row, o_sum, o_entry = _tile(C, R, L, BLOCK_R, BLOCK_L)
    b_scale = tl.load(scale + o_row, mask=m_r, other=0.0) * _LOG2E
    b_maximum = tl.load(maximum + o_row, mask=m_r, other=0.0) * b_scale
    b_logits = tl.load(logits + o_entry, mask=m, other=0.0).to(tl.float32) * b_scale[:, None]
    b_probability = tl.exp2(b_logits - b_maximum[:, None])  # [BR, BL]
    b_probability = tl.where(_counting(column_mask, o_l, L)[None, :], b_probability, 0.0)
    tl.store(sums + o_sum, tl.sum(b_probability, 1), mask=m_r)
    if seed is not None:
        b_probability = tl.where(_kept(seed, first_row, o_row, o_l, threshold), b_probability, 0.0)
    tl.store(probability + o_entry, b_probability.to(probability.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gradient_kernel(
    grad, probability, logits, scale, grad_unit, rstd, lse, column_mask, seed, first_row, threshold, keep_scale, C, R,
    L, sums, delta, slope, offset, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Without delta a tile's row sums (4, tiles, B, H, C) of P M dP, of P, and of both times S. M is dropout's mask.

    With delta P M and dS = rstd (P (M dP - delta) - slope S - offset), and the tile's row sums of dS as rounded.
    """
    o_l, m_r, m, o_row, o_sum, o_entry = _tile(C, R, L, BLOCK_R, BLOCK_L)
    b_logits = tl.load(logits + o_entry, mask=m, other=0.0).to(tl.float32)
    b_logits *= tl.load(scale + o_row, mask=m_r, other=0.0)[:, None]
    m_counts = _counting(column_mask, o_l, L)[None, :]
    b_probability = tl.exp2(b_logits * _LOG2E - tl.load(lse + o_row, mask=m_r, other=0.0)[:, None])  # [BR, BL]
    b_probability = tl.where(m_counts, b_probability, 0.0)
    b_kept = b_probability * keep_scale
    if seed is not None:
        b_kept = tl.where(_kept(seed, first_row, o_row, o_l, threshold), b_kept, 0.0)
    b_grad = tl.load(grad + o_entry, mask=m, other=0.0).to(tl.float32)
    if grad_unit is not None:
        b_grad *= tl.load(grad_unit)
    b_grad *= b_kept
    if delta is None:
        size = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * R
        tl.store(sums + o_sum, tl.sum(b_grad, 1), mask=m_r)
        tl.store(sums + size + o_sum, tl.sum(b_probability, 1), mask=m_r)
        tl.store(sums + 2 * size + o_sum, tl.sum(b_grad * b_logits, 1), mask=m_r)
        tl.store(sums + 3 * size + o_sum, tl.sum(b_probability * b_logits, 1), mask=m_r)
    else:
        b_grad -= b_probability * tl.load(delta + o_row, mask=m_r, other=0.0)[:, None]
        b_grad -= b_logits * tl.load(slope + o_row, mask=m_r, other=0.0)[:, None]
        b_grad -= tl.load(offset + o_row, mask=m_r, other=0.0)[:, None]
        b_grad *= tl.load(rstd + o_row, mask=m_r, other=0.0)[:, None]
        b_grad = tl.where(m_counts, b_grad, 0.0).to(grad.dtype.element_ty)
        tl.store(probability + o_entry, b_kept.to(probability.dtype.element_ty), mask=m)
        tl.store(grad + o_entry, b_grad, mask=m)
        tl.store(sums + o_sum, tl.sum(b_grad.to(tl.float32), 1), mask=m_r)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def finish_kernel(
    parts, sums, scale, maximum, lse, rstd, offset, count, mean, result, N, C, R, pieces, keep_scale,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The output (B, H, N, C) from parts of v Pᵀ, and lse; or, where maximum is None, dq from parts of k dSᵀ.

    sums (B, H, C) are those of P, or of dS as it was rounded. In units of log2, lse is 0 for rows without a column.
    """
    i_r, i_n, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    maps = tl.num_programs(2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_r = o_n < N, o_r < R
    m = m_n[:, None] & m_r[None, :]
    o_row = _row_index(i_map, o_r, C, maps)
    b_sum = tl.load(sums + o_row, mask=m_r, other=0.0)
    b_result = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for piece in range(pieces):
        o_part = ((tl.cast(piece, tl.int64) * maps + i_map) * N + o_n[:, None]) * R + o_r[None, :]
        b_result += tl.load(parts + o_part, mask=m, other=0.0)
    if maximum is not None:
        b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_result *= (keep_scale / b_divisor)[None, :]
        b_maximum = tl.load(maximum + o_row, mask=m_r, other=0.0) * tl.load(scale + o_row, mask=m_r, other=0.0)
        b_lse = tl.where(b_sum == 0.0, 0.0, b_maximum * _LOG2E + tl.log2(b_divisor))
        tl.store(lse + o_row, b_lse, mask=m_r & (i_n == 0))
    else:
        # Exactly, a row of dS sums to -rstd · offset · count. What rounding adds to that would meet the key's mean.
        b_exact = tl.load(rstd + o_row, mask=m_r, other=0.0) * tl.load(offset + o_row, mask=m_r, other=0.0)
        b_excess = b_sum + b_exact * tl.load(count + i_map * N)
        b_result -= tl.load(mean + i_map * N + o_n, mask=m_n, other=0.0)[:, None] * b_excess[None, :]
    tl.store(result + _token_index(i_map, o_n, o_r, N, C, maps), b_result.to(result.dtype.element_ty), mask=m)
