"""The dropout mask of attention: a hash of position, so that no mask is ever stored.

An entry (row, column) of the map of sample b and head h is kept or dropped by the finaliser *lowbias32* (C. Wellons,
"Prospecting for Hash Functions", 2018) of ``row_key ^ column_key``; the keys are hashes of the seed with (b, h, row)
and with the column. Forward and backward, on any backend and in any tiling, so see the same mask.
"""

import torch
from torch import Tensor

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_UINT32 = 0xFFFFFFFF


def _lowbias32(x: Tensor) -> Tensor:
    """lowbias32 of unsigned 32-bit numbers held in int64."""
    x = ((x ^ (x >> 16)) * _MULTIPLIER_1) & _UINT32
    x = ((x ^ (x >> 15)) * _MULTIPLIER_2) & _UINT32
    return x ^ (x >> 16)


def _as_int32(x: Tensor) -> Tensor:
    return torch.where(x > 0x7FFFFFFF, x - (1 << 32), x).to(torch.int32)


def _signed(x: int) -> int:
    return x - (1 << 32) if x > 0x7FFFFFFF else x


def hash_keys(seed: Tensor, batch: int, heads: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Keys of the rows and columns of every similarity map.

    Args:
        seed: int64 tensor of shape ().
        batch: number of samples B.
        heads: number of heads H.
        rows: query channels of one map.
        columns: key channels L.

    Returns:
        row keys (B, H, rows) and column keys (columns,), int32.
    """
    stream = _lowbias32((seed & _UINT32) ^ _lowbias32((seed >> 32) & _UINT32))
    row = torch.arange(batch * heads * rows, device=seed.device)
    column = torch.arange(columns, device=seed.device)
    row_key = _lowbias32(stream ^ _lowbias32(row))
    column_key = _lowbias32(_lowbias32(stream) ^ _lowbias32(column))
    return _as_int32(row_key).view(batch, heads, rows), _as_int32(column_key)


def keep_mask(row_key: Tensor, column_key: Tensor, dropout_p: float) -> Tensor:
    """Which entries survive dropout.

    Args:
        row_key: int32 (..., rows).
        column_key: int32 (columns,).
        dropout_p: probability of dropping an entry, in [0, 1).

    Returns:
        int32 (..., rows, columns), 1 where the entry is kept, else 0: on a CPU a product with booleans takes twice as
        long, and so does their comparison.
    """
    # Shift and xor work on bits one by one, so the first step is taken on the keys, before there is a map.
    x = _xor_shift(row_key, 16)[..., None] ^ _xor_shift(column_key, 16)
    x *= _MULTIPLIER_1
    x = _xor_shift(x, 15)
    x *= _signed(_MULTIPLIER_2)
    # The finaliser's last step is left out: it leaves the high bits alone, and those decide the comparison.
    return x.ge_(round(dropout_p * 2**32) - 2**31)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """Xor of int32 with itself, shifted right by a shift that brings in zeros, where torch's brings in the sign."""
    shifted = x >> bits
    shifted &= (1 << (32 - bits)) - 1
    shifted ^= x
    return shifted
