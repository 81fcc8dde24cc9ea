"""Tile sizes of the Triton kernels of the depthwise convolution + GELU, the same for every device.

They compile without register spills everywhere (tests/kernels/test_compile_targets.py). No GPU has timed them yet, so
what each device takes is found by timing (tuning.py), and torch's own convolution and GELU take part in that.
"""

from typing import Literal, NamedTuple


class Tile(NamedTuple):
    """What a program computes: ``pixels`` columns of ``rows`` rows, one row at a time, in ``channels`` channels."""

    rows: int
    pixels: int
    channels: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"BLOCK_Y": self.rows, "BLOCK_X": self.pixels, "BLOCK_C": self.channels, "num_warps": self.num_warps}


Choice = Tile | Literal["torch"]
# Hidden channels of Mix-FFNs are multiples of 64. The first are also what is taken where nothing may be timed.
FORWARD_TILES = (Tile(16, 8, 64, num_warps=4), Tile(16, 8, 128, num_warps=4))
BACKWARD_TILES = (Tile(16, 8, 64, num_warps=4), Tile(32, 8, 64, num_warps=4))
