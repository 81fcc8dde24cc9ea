"""Tile sizes of the Triton kernels: one table, chosen from by device, dtype and number of tokens.

Every entry compiles without register spills on the devices it serves (tests/kernels/test_compile_targets.py), with
matrix instructions of the newest kind there for half precision. docs/kernels.md says why these sizes.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Tile and launch options; a dimension that the kernel sums over is taken in steps of its size."""

    rows: int
    columns: int
    tokens: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_R": self.rows,
            "BLOCK_L": self.columns,
            "BLOCK_N": self.tokens,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Tiles(NamedTuple):
    """Tiles of the kernels; ``merge_narrow`` is for at most 320 tokens, of which 128 at a time would waste many."""

    probability: Tile
    merge_narrow: Tile
    merge_wide: Tile
    gradient: Tile

    def merge(self, tokens: int) -> Tile:
        """The tile of the merge kernel for ``tokens`` tokens."""
        return self.merge_narrow if tokens <= 320 else self.merge_wide


HALF = {
    "sm_80": Tiles(
        probability=Tile(128, 128, 32, num_warps=8, num_stages=4),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=3),
        merge_wide=Tile(128, 64, 128, num_warps=8, num_stages=3),
        gradient=Tile(64, 128, 32, num_warps=8, num_stages=4),
    ),
    "sm_90": Tiles(
        probability=Tile(128, 256, 64, num_warps=8, num_stages=3),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=3),
        merge_wide=Tile(128, 64, 128, num_warps=8, num_stages=3),
        gradient=Tile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    "sm_100": Tiles(
        probability=Tile(128, 128, 64, num_warps=8, num_stages=3),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=3),
        merge_wide=Tile(128, 64, 128, num_warps=8, num_stages=3),
        gradient=Tile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    "gfx942": Tiles(
        probability=Tile(128, 128, 32, num_warps=8, num_stages=2),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=2),
        merge_wide=Tile(128, 32, 128, num_warps=8, num_stages=2),
        gradient=Tile(128, 128, 32, num_warps=8, num_stages=2),
    ),
}
_SINGLE = Tiles(
    probability=Tile(64, 64, 16, num_warps=4, num_stages=3),
    merge_narrow=Tile(64, 32, 64, num_warps=8, num_stages=3),
    merge_wide=Tile(64, 32, 64, num_warps=8, num_stages=3),
    gradient=Tile(64, 32, 16, num_warps=4, num_stages=3),
)


def select_tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The tiles for ``dtype`` on ``device``; the interpreter on a CPU takes those of sm_80."""
    if dtype == torch.float32:
        return _SINGLE
    if device.type == "cpu":
        return HALF["sm_80"]
    if torch.version.hip:
        return HALF["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    # sm_80's need no more shared memory than the smallest devices have (sm_86, sm_89, sm_120).
    return HALF[{9: "sm_90", 10: "sm_100"}.get(major, "sm_80")]
