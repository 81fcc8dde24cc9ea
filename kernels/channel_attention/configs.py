"""Tile sizes of the Triton kernels: tables, chosen from by device, dtype and number of tokens.

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


_HALF = {
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


class OnePassTile(NamedTuple):
    """Tile and launch options of the one-pass forward; the chunks cover the tokens."""

    rows: int
    columns: int
    chunks: tuple[int, ...]
    num_warps: int
    num_stages: int


# Crops of 512 and 513 have 256 and 289 tokens. Two blocks fit on an SM, so one computes while the other waits.
_ONE_PASS = {
    range(193, 257): OnePassTile(64, 64, (256,), num_warps=4, num_stages=1),
    range(257, 305): OnePassTile(64, 64, (256, 32, 16), num_warps=4, num_stages=1),
}


def device_class(device: torch.device) -> str:
    """The row of the table for ``device``; the interpreter on a CPU takes that of sm_80."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # sm_80's need no more shared memory than the smallest devices have (sm_86, sm_89, sm_120).
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def select_tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The tiles of the split softmax for ``dtype`` on ``device``."""
    return _SINGLE if dtype == torch.float32 else _HALF[device_class(device)]


def select_one_pass_tile(device: torch.device, dtype: torch.dtype, tokens: int) -> OnePassTile | None:
    """The tile of the one-pass forward, or None where it would spill registers."""
    if dtype == torch.float32 or device_class(device) not in ("sm_90", "sm_100"):
        return None
    return next((tile for sizes, tile in _ONE_PASS.items() if tokens in sizes), None)
