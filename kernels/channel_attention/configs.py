"""Tile sizes of the Triton kernels: tables, chosen from by device, dtype and number of tokens.

Where several serve, the first is the best guess, and tuning.py times them on the GPU at hand. Every entry compiles
without register spills on the devices it serves (tests/kernels/test_compile_targets.py), with matrix instructions of
the newest kind there for half precision. docs/kernels.md says why these sizes.
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


class SplitTiles(NamedTuple):
    """Tiles of the forward pass by a split softmax."""

    probability: Tile
    merge: Tile


class OnePassTile(NamedTuple):
    """Tile and launch options of the one-pass forward; the chunks cover the tokens."""

    rows: int
    columns: int
    chunks: tuple[int, ...]
    num_warps: int
    num_stages: int


class _Table(NamedTuple):
    """Tiles of a device; ``merge_narrow`` is for at most 320 tokens."""

    probability: tuple[Tile, ...]
    merge_narrow: Tile
    merge_wide: Tile
    gradient: tuple[Tile, ...]


_HALF = {
    "sm_80": _Table(
        probability=(Tile(128, 128, 32, num_warps=8, num_stages=4),),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=3),
        merge_wide=Tile(128, 64, 128, num_warps=8, num_stages=3),
        gradient=(Tile(64, 128, 32, num_warps=8, num_stages=4),),
    ),
    "sm_90": _Table(
        probability=(Tile(128, 128, 64, num_warps=4, num_stages=3), Tile(128, 256, 64, num_warps=8, num_stages=3)),
        merge_narrow=Tile(128, 128, 128, num_warps=8, num_stages=3),
        merge_wide=Tile(128, 128, 128, num_warps=8, num_stages=3),
        gradient=(Tile(128, 128, 64, num_warps=8, num_stages=3), Tile(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    "sm_100": _Table(
        probability=(Tile(128, 128, 64, num_warps=8, num_stages=3),),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=3),
        merge_wide=Tile(128, 64, 128, num_warps=8, num_stages=3),
        gradient=(Tile(128, 128, 64, num_warps=8, num_stages=3),),
    ),
    "gfx942": _Table(
        probability=(Tile(128, 128, 32, num_warps=8, num_stages=2),),
        merge_narrow=Tile(128, 64, 64, num_warps=4, num_stages=2),
        merge_wide=Tile(128, 32, 128, num_warps=8, num_stages=2),
        gradient=(Tile(128, 128, 32, num_warps=8, num_stages=2),),
    ),
}
_SINGLE = _Table(
    probability=(Tile(64, 64, 16, num_warps=4, num_stages=3),),
    merge_narrow=Tile(64, 32, 64, num_warps=8, num_stages=3),
    merge_wide=Tile(64, 32, 64, num_warps=8, num_stages=3),
    gradient=(Tile(64, 32, 16, num_warps=4, num_stages=3),),
)


# Crops of 512 and 513 have 256 and 289 tokens. 128 rows read the keys half as often as 64, of which two blocks fit on
# an SM, so that one computes while the other waits. Without chunks Triton 3.6 spills the larger ones.
_ONE_PASS = {
    range(193, 257): (OnePassTile(64, 64, (256,), num_warps=4, num_stages=1),),
    range(257, 305): (
        OnePassTile(128, 32, (256, 32, 16), num_warps=8, num_stages=3),
        OnePassTile(64, 64, (256, 32, 16), num_warps=4, num_stages=1),
    ),
}
# For each problem.
MAX_CHOICES = 3


def device_class(device: torch.device) -> str:
    """The row of the table for ``device``; the interpreter on a CPU takes that of sm_80."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # sm_80's need no more shared memory than the smallest devices have (sm_86, sm_89, sm_120).
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _table(device: torch.device, dtype: torch.dtype) -> _Table:
    return _SINGLE if dtype == torch.float32 else _HALF[device_class(device)]


def forward_tiles(device: torch.device, dtype: torch.dtype, tokens: int) -> list[OnePassTile | SplitTiles]:
    """At most three for the forward pass; one pass only where that spills no registers."""
    table = _table(device, dtype)
    merge = table.merge_narrow if tokens <= 320 else table.merge_wide
    one_pass: tuple[OnePassTile, ...] = ()
    if dtype != torch.float32 and device_class(device) in ("sm_90", "sm_100"):
        one_pass = next((tiles for sizes, tiles in _ONE_PASS.items() if tokens in sizes), ())
    split = [SplitTiles(probability, merge) for probability in table.probability]
    choices: list[OnePassTile | SplitTiles] = [*one_pass, *split]
    return choices[:MAX_CHOICES]


def gradient_tiles(device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """At most three for the backward pass."""
    return _table(device, dtype).gradient
