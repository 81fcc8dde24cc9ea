"""The dropout mask of attention: a hash of position, so that no mask is ever stored.

An entry (row, column) of the map of sample b and head h is kept or dropped by the finalizer *lowbias32* (C. Wellons,
"Prospecting for Hash Functions", 2018) of ``row_key ^ column_key``; the keys are hashes of the seed with (b, h, row)
and with the column. Forward and backward, on any backend and in any tiling, so see the same mask.

The finalizer's first and last step, x ^ (x >> 16), undo each other. So keys are stored without their last step, and an
entry's hash has no first one. It has no last one either, which changes none of the high bits that decide.
"""

import torch
from torch import Tensor

# Numbers of 32 bits are held in int32, whose products wrap.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """Xor with itself, shifted right by a shift that brings in zeros, where torch's brings in the sign."""
    shifted = x >> bits
    shifted &= (1 << (32 - bits)) - 1
    shifted ^= x
    return shifted


def _multiply(x: Tensor) -> Tensor:
    """The finalizer without its first and last step; changes x."""
    x *= _MULTIPLIER_1
    x = _xor_shift(x, 15)
    x *= _MULTIPLIER_2
    return x


def _lowbias32(x: Tensor) -> Tensor:
    return _xor_shift(_multiply(_xor_shift(x, 16)), 16)


def hash_keys(seed: Tensor, batch: int, heads: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the keys of the rows (B, H, rows) and columns (columns,) of all maps, int32, for a seed int64 ()."""
    stream = _lowbias32(seed.to(torch.int32) ^ _lowbias32((seed >> 32).to(torch.int32)))
    row, column = (torch.arange(n, dtype=torch.int32, device=seed.device) for n in (batch * heads * rows, columns))
    row_key, column_key = (
        _multiply(_xor_shift(key ^ _lowbias32(x), 16)) for key, x in ((stream, row), (_lowbias32(stream), column))
    )
    return row_key.view(batch, heads, rows), column_key


def keep_mask(row_key: Tensor, column_key: Tensor, dropout_p: float) -> Tensor:
    """Return which entries (..., rows, columns) survive dropout, given the keys (..., rows) and (columns,).

    They are int32, 1 or 0: on a CPU a product with booleans takes twice as long, and so does their comparison.
    """
    return _multiply(row_key[..., None] ^ column_key).ge_(drop_threshold(dropout_p))


def drop_threshold(dropout_p: float) -> int:
    """Return the int32 below which hashes are dropped."""
    return round(dropout_p * 2**32) - 2**31
