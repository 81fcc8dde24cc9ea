"""What the Triton schedules of channel attention share: operands as maps, addressing, masks and the dropout hash."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pointers(x, i_map, N, C, o_n, o_c):
    """Pointers to tokens o_n of channels o_c in one map of x (maps, N, C), in the shape that o_n and o_c span.

    A tile is addressed in the shape in which it enters a product: transposed after its load, it would pass through
    registers on its way to shared memory on sm_80.
    """
    return x + (i_map * N + o_n) * C + o_c  # int64, as i_map is


@triton.jit
def unmasked_columns(column_mask, o_l, L):
    """Which columns exist and count."""
    m_l = o_l < L
    if column_mask is not None:
        m_l &= tl.load(column_mask + o_l, mask=m_l, other=0) != 0
    return m_l  # [BL]


@triton.jit
def _lowbias32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(seed, i_map, o_r, o_l, C, threshold):
    """The entries that dropout.keep_mask keeps; a map's row is channel o_r % C of its sample o_r // C."""
    b_seed = tl.load(seed)
    stream = _lowbias32(b_seed.to(tl.uint32) ^ _lowbias32((b_seed >> 32).to(tl.uint32)))
    row = (i_map + (o_r // C) * tl.num_programs(2)) * C + o_r % C
    row_key = _lowbias32(stream ^ _lowbias32(row.to(tl.uint32)))
    column_key = _lowbias32(_lowbias32(stream) ^ _lowbias32(o_l.to(tl.uint32)))
    # The hash's first step is linear in xor, so the keys take it, not every entry.
    row_key ^= row_key >> 16
    column_key ^= column_key >> 16
    x = (row_key[:, None] ^ column_key[None, :]) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x.to(tl.int32, bitcast=True) >= threshold  # [BR, BL]


class Maps:
    """The maps of one call.

    Attributes:
        query: (maps, N, R) in the key's dtype; samples that share their keys are rows of one map.
        key: (maps, N, L); centered in float32, but not in half precision, where that would round.
        value: (maps, N, L).
        scale: (maps, R) float32, of each row's logits.
        key_mean: (maps, N, 1) float32.
        column_mask: bool (L,) or None.
        seed: int64 () if there is dropout, else None.
        channels: query channels C of one sample; R is C or B · C.
        threshold: hashes below are dropped, see dropout.keep_mask.
        keep_scale: factor of what is kept.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Tensor,
        key_mean: Tensor,
        column_mask: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.shape = query.shape
        self.shared_key = key.shape[0] == 1
        self.query = self.pack(query.to(key.dtype))
        self.scale = self.pack(scale.expand(-1, -1, 1, query.shape[3]))
        self.key_mean = key_mean.flatten(0, 1)
        if key.dtype == torch.float32:
            key = key - key_mean
        self.key, self.value = (x.flatten(0, 1).contiguous() for x in (key, value))
        self.column_mask = None if column_mask is None else column_mask.contiguous()
        self.channels = query.shape[3]
        self.seed = seed if dropout_p > 0 else None
        self.threshold = round(dropout_p * 2**32) - 2**31
        self.keep_scale = 1 / (1 - dropout_p)

    def centered_keys(self, columns: slice) -> Tensor:
        """Columns of the key without its mean, in its dtype."""
        keys = self.key[..., columns]
        return keys if keys.dtype == torch.float32 else torch.sub(keys, self.key_mean, out=torch.empty_like(keys))

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, N, C) -> (maps, N, rows): samples that share their keys are rows of one map."""
        if self.shared_key:
            x = x.permute(1, 2, 0, 3).flatten(2)[None]
        return x.flatten(0, 1).contiguous()

    def unpack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(maps, N or 1, rows) -> (B, H, N or 1, C), contiguous."""
        batch, heads, _, channels = self.shape
        if self.shared_key:
            x = x.view(heads, -1, batch, channels).permute(2, 0, 1, 3)
        else:
            x = x.view(batch, heads, -1, channels)
        return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
