"""Triton kernels over whole rows of the similarity map: what lies between the library's matrix products.

A map is one (sample, head), its rows are query channels and its columns key channels. Samples that share their keys
are rows of one map: row r of R is channel r % C of its sample r // C. Names have the same meaning in all kernels:

    key, half_key           (maps, N, L)      and over a power of two in half precision, centered; float32 stays float32
    half_rows               (maps, N, R)      the query or the output's gradient, over a power of two a row
    logits, probability     (maps, R, L)      products of half_rows and half_key, and P in the same memory
    grad                    (maps, R, L)      dP, and dS in the same memory
    parts                   (pieces, maps, N, R) float32: a product over L in pieces
    mean, peak, count       (maps, N)         of a key's token: mean, largest distance from it; columns that count
    unit, shift, maximum, squares, rstd, lse, delta, slope, offset    (B, H, C): a number a row
    sums                    (..., tiles, B, H, C): row sums of each tile
    column_mask             (L,)              columns that count; None if all do
    seed                    ()                of dropout; None without. Row 0 is row first_row of the hash

Normalized logits are S = rstd (unit · product + shift - mean shift); softmax ignores what is constant in a row.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# These vary from call to call, and must not compile anew.
_UNSPECIALIZED = ["threshold", "keep_scale", "range_factor", "eps", "pieces", "tiles", "first_row"]


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
def _sample(C, BLOCK_C: tl.constexpr):
    """Of a program for each sample of a map: its map, which of its rows exist, and where they stand."""
    i_sample, i_map = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    return i_map, o_c < C, (i_sample * tl.num_programs(1) + i_map) * C + o_c


@triton.jit
def _sum_tiles(sums, o_row, m_r, row_count, tiles, BLOCK_R: tl.constexpr):
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for tile in range(tiles):
        b_sum += tl.load(sums + tl.cast(tile, tl.int64) * row_count + o_row, mask=m_r, other=0.0)
    return b_sum  # [BR]


@triton.jit
def _inverse_power_of_two(x):
    """2^-e with e the exponent of x > 0, so that their product lies in [1, 2); 1 for zero."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 32), 240)  # so that neither the result nor its inverse overflows
    return tl.where(x > 0.0, ((254 - exponent) << 23).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _log2_scale(unit, rstd, o_row, m_r):
    """What turns products into normalized logits in units of log2."""
    return tl.load(unit + o_row, mask=m_r, other=0.0) * tl.load(rstd + o_row, mask=m_r, other=0.0) * _LOG2E  # [BR]


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
def key_statistics_kernel(key, column_mask, mean, peak, count, L, BLOCK_L: tl.constexpr):
    """Mean and peak of one token, and how many columns count (at least 1); one program each."""
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
    b_peak = tl.maximum(tl.max(b_high, 0) - b_mean, b_mean - tl.min(b_low, 0))
    tl.store(mean + i_n, b_mean)
    tl.store(peak + i_n, tl.maximum(b_peak, 0.0))  # without a column it is -inf
    tl.store(count + i_n, columns)


@triton.jit
def half_key_kernel(
    key, column_mask, mean, peak, half_key, key_unit, N, L, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr
):
    """(key - mean) / key_unit, zero at masked columns; the unit of a map (maps,) brings its peak to [1, 2)."""
    i_n, i_l, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    b_peak = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, N, BLOCK_N):
        b_peak = tl.maximum(b_peak, tl.load(peak + i_map * N + n + o_n, mask=n + o_n < N, other=0.0))
    inverse = _inverse_power_of_two(tl.max(b_peak, 0))
    o_n += i_n * BLOCK_N
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    m_n = o_n < N
    m = m_n[:, None] & (o_l < L)[None, :]
    o_key = (i_map * N + o_n[:, None]) * L + o_l[None, :]
    b_key = tl.load(key + o_key, mask=m, other=0.0).to(tl.float32)  # [BN, BL]
    b_key = (b_key - tl.load(mean + i_map * N + o_n, mask=m_n, other=0.0)[:, None]) * inverse
    b_key = tl.where(_counting(column_mask, o_l, L)[None, :], b_key, 0.0)
    tl.store(half_key + o_key, b_key.to(half_key.dtype.element_ty), mask=m)
    tl.store(key_unit + i_map, 1.0 / inverse, mask=(i_n == 0) & (i_l == 0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def half_rows_kernel(
    x, mean, key_unit, value_peak, half_rows, unit, shift, N, C, R, range_factor,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of x (B, H, N, C) times range_factor / their power of two; unit turns products into those of x and key.

    The query will meet half_key, and shift is its product with the key's mean. A gradient, which comes without mean,
    will meet the value as it is, whose largest entry of each map is in value_peak (maps,).
    """
    i_r, i_map = tl.program_id(0), tl.program_id(1).to(tl.int64)
    maps = tl.num_programs(1)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    m_r = o_r < R
    o_row = _row_index(i_map, o_r, C, maps)
    b_peak = tl.zeros([BLOCK_R], tl.float32)
    b_shift = tl.zeros([BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        m_n = n + o_n < N
        p_x = x + _token_index(i_map, n + o_n, o_r, N, C, maps)
        b_x = tl.load(p_x, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)  # [BN, BR]
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_x), 0))
        if mean is not None:
            b_mean = tl.load(mean + i_map * N + n + o_n, mask=m_n, other=0.0)
            b_shift += tl.sum(b_x * b_mean[:, None], 0)
    b_inverse = _inverse_power_of_two(b_peak) * range_factor  # [BR]
    if mean is not None:
        tl.store(shift + o_row, b_shift, mask=m_r)
        tl.store(unit + o_row, tl.load(key_unit + i_map) / b_inverse, mask=m_r)
    else:
        # A tiny matrix must not make the rows overflow.
        b_inverse *= tl.minimum(_inverse_power_of_two(tl.load(value_peak + i_map)), 16384.0 / range_factor)
        tl.store(unit + o_row, 1.0 / b_inverse, mask=m_r)
    for n in range(0, N, BLOCK_N):
        m = (n + o_n < N)[:, None] & m_r[None, :]
        b_x = tl.load(x + _token_index(i_map, n + o_n, o_r, N, C, maps), mask=m, other=0.0).to(tl.float32)
        b_x = (b_x * b_inverse[None, :]).to(half_rows.dtype.element_ty)
        tl.store(half_rows + (i_map * N + (n + o_n)[:, None]) * R + o_r[None, :], b_x, mask=m)


@triton.jit
def row_statistics_kernel(logits, column_mask, maximum, squares, C, R, L, BLOCK_L: tl.constexpr):
    """Maximum and sum of squares of one row of products, whose masked columns are zero; one program each."""
    i_r, i_map = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    b_maximum = tl.full([BLOCK_L], float("-inf"), tl.float32)
    b_squares = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, L, BLOCK_L):
        p_logits = logits + (i_map * R + i_r) * L + start + o_l
        b_logits = tl.load(p_logits, mask=start + o_l < L, other=0.0).to(tl.float32)
        m_l = _counting(column_mask, start + o_l, L)
        b_maximum = tl.maximum(b_maximum, tl.where(m_l, b_logits, float("-inf")))
        b_squares += b_logits * b_logits
    o_row = _row_index(i_map, i_r, C, tl.num_programs(1))
    tl.store(maximum + o_row, tl.max(b_maximum, 0))
    tl.store(squares + o_row, tl.sum(b_squares, 0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def rstd_kernel(squares, unit, shift, count, rstd, N, C, eps, BLOCK_C: tl.constexpr):
    """1 / standard deviation of a sample's map, for each of its rows; the rows of products sum to zero."""
    i_map, m_c, o_row = _sample(C, BLOCK_C)
    b_unit = tl.load(unit + o_row, mask=m_c, other=0.0)
    b_shift = tl.load(shift + o_row, mask=m_c, other=0.0)
    b_shift = tl.where(m_c, b_shift - tl.sum(b_shift, 0) / C, 0.0)
    b_squares = tl.load(squares + o_row, mask=m_c, other=0.0) * b_unit * b_unit / tl.load(count + i_map * N)
    variance = tl.sum(b_squares + b_shift * b_shift, 0) / C
    tl.store(rstd + o_row, tl.zeros([BLOCK_C], tl.float32) + 1.0 / tl.sqrt(variance + eps), mask=m_c)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_kernel(
    probability, logits, unit, rstd, maximum, sums, column_mask, seed, first_row, threshold, C, R, L,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """P = exp2(normalized logits - maximum) after dropout, and the row sums of a tile before it."""
    o_l, m_r, m, o_row, o_sum, o_entry = _tile(C, R, L, BLOCK_R, BLOCK_L)
    b_scale = _log2_scale(unit, rstd, o_row, m_r)
    b_maximum = tl.load(maximum + o_row, mask=m_r, other=0.0) * b_scale
    b_logits = tl.load(logits + o_entry, mask=m, other=0.0).to(tl.float32) * b_scale[:, None]
    b_probability = tl.exp2(b_logits - b_maximum[:, None])  # [BR, BL]
    b_probability = tl.where(_counting(column_mask, o_l, L)[None, :], b_probability, 0.0)
    tl.store(sums + o_sum, tl.sum(b_probability, 1), mask=m_r)
    if seed is not None:
        b_probability = tl.where(_kept(seed, first_row, o_row, o_l, threshold), b_probability, 0.0)
    tl.store(probability + o_entry, b_probability.to(probability.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def norm_gradient_kernel(sums, shift, rstd, count, delta, slope, offset, N, C, tiles, BLOCK_C: tl.constexpr):
    """For the rows of a sample: delta = sum of P M dP, slope = mean of dS S over the map, offset = slope · shift."""
    i_map, m_c, o_row = _sample(C, BLOCK_C)
    row_count = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * C
    size = row_count * tiles
    # P sums to 1 but for rounding. Over its very sum, rows of dS sum to zero even where one key gets nearly all.
    b_total = _sum_tiles(sums + size, o_row, m_c, row_count, tiles, BLOCK_C)
    b_delta = _sum_tiles(sums, o_row, m_c, row_count, tiles, BLOCK_C) / tl.where(b_total == 0.0, 1.0, b_total)
    b_dot = _sum_tiles(sums + 2 * size, o_row, m_c, row_count, tiles, BLOCK_C)
    b_dot -= b_delta * _sum_tiles(sums + 3 * size, o_row, m_c, row_count, tiles, BLOCK_C)
    b_slope = tl.zeros([BLOCK_C], tl.float32) + tl.sum(b_dot, 0) / (C * tl.load(count + i_map * N))
    b_shift = tl.load(shift + o_row, mask=m_c, other=0.0)
    b_shift = (b_shift - tl.sum(b_shift, 0) / C) * tl.load(rstd + o_row, mask=m_c, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_c)
    tl.store(slope + o_row, b_slope, mask=m_c)
    tl.store(offset + o_row, b_slope * b_shift, mask=m_c)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gradient_kernel(
    grad, probability, logits, unit, grad_unit, rstd, lse, delta, slope, offset, sums,
    column_mask, seed, first_row, threshold, keep_scale, C, R, L, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Without delta a tile's row sums (4, tiles, B, H, C) of P M dP, of P, and of both times S. M is dropout's mask.

    With delta P M and dS = rstd (P (M dP - delta) - slope S - offset), and the tile's row sums of dS as rounded.
    """
    o_l, m_r, m, o_row, o_sum, o_entry = _tile(C, R, L, BLOCK_R, BLOCK_L)
    b_logits = tl.load(logits + o_entry, mask=m, other=0.0).to(tl.float32)
    b_logits *= _log2_scale(unit, rstd, o_row, m_r)[:, None]
    m_counts = m_r[:, None] & _counting(column_mask, o_l, L)[None, :]
    b_probability = tl.exp2(b_logits - tl.load(lse + o_row, mask=m_r, other=0.0)[:, None])  # [BR, BL]
    b_probability = tl.where(m_counts, b_probability, 0.0)
    b_logits *= 1 / _LOG2E
    b_kept = b_probability * keep_scale
    if seed is not None:
        b_kept = tl.where(_kept(seed, first_row, o_row, o_l, threshold), b_kept, 0.0)
    b_grad = tl.load(grad + o_entry, mask=m, other=0.0).to(tl.float32)
    if grad_unit is not None:
        b_grad *= tl.load(grad_unit + o_row, mask=m_r, other=0.0)[:, None]
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
    parts, sums, unit, rstd, maximum, lse, offset, count, mean, result, N, C, R, pieces, tiles, keep_scale,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The output (B, H, N, C) from parts of v Pᵀ, and lse; or, where maximum is None, dq from parts of k dSᵀ.

    The sums are those of P, or of dS as it was rounded. In units of log2, lse is 0 for rows without a column.
    """
    i_r, i_n, i_map = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    maps = tl.num_programs(2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_r = o_n < N, o_r < R
    m = m_n[:, None] & m_r[None, :]
    o_row = _row_index(i_map, o_r, C, maps)
    b_sum = _sum_tiles(sums, o_row, m_r, maps.to(tl.int64) * R, tiles, BLOCK_R)
    b_result = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for piece in range(pieces):
        o_part = ((tl.cast(piece, tl.int64) * maps + i_map) * N + o_n[:, None]) * R + o_r[None, :]
        b_result += tl.load(parts + o_part, mask=m, other=0.0)
    if maximum is not None:
        b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_result *= (keep_scale / b_divisor)[None, :]
        b_maximum = tl.load(maximum + o_row, mask=m_r, other=0.0) * _log2_scale(unit, rstd, o_row, m_r)
        b_lse = tl.where(b_sum == 0.0, 0.0, b_maximum + tl.log2(b_divisor))
        tl.store(lse + o_row, b_lse, mask=m_r & (i_n == 0))
    else:
        # Exactly, a row of dS sums to -rstd · offset · count. What rounding adds to that would meet the key's mean.
        b_exact = tl.load(rstd + o_row, mask=m_r, other=0.0) * tl.load(offset + o_row, mask=m_r, other=0.0)
        b_excess = b_sum + b_exact * tl.load(count + i_map * N)
        b_result -= tl.load(mean + i_map * N + o_n, mask=m_n, other=0.0)[:, None] * b_excess[None, :]
    tl.store(result + _token_index(i_map, o_n, o_r, N, C, maps), b_result.to(result.dtype.element_ty), mask=m)
