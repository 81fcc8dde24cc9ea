"""Bilinear resizing with align_corners=False: its weights, and resizing in bands of output rows."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate

# Size of a band with its indices: 1 MB was the fastest of 1/8 to 1 MB, with the fewest calls.
BAND_BYTES = 2**20
# Softmax and maximum over a contiguous axis of fewer classes leave most of a vector register empty.
_CLASSES_LAST = 32


def linear_taps(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the source positions and weights of a linear resize, those of torch.nn.functional.interpolate.

    Args:
        source: number of source positions.
        target: number of output positions.
        like: a tensor with the device and dtype of the weights.

    Returns:
        index (target, 2) int64 of the source positions before and after, and their weights (target, 2). Positions are
        fractions of integers, so that only the weights are rounded.
    """
    # In units of 1 / (2 * target): (x + 1/2) * source / target - 1/2.
    position = (2 * torch.arange(target, device=like.device) + 1) * source - target
    position.clamp_(min=0)
    before = position // (2 * target)
    weight = (position % (2 * target)).to(like.dtype) / (2 * target)
    return torch.stack([before, (before + 1).clamp_(max=source - 1)], 1), torch.stack([1 - weight, weight], 1)


def linear_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """Return the dense matrix (target, source) of the resize; arguments as in ``linear_taps``."""
    identity = torch.eye(source, dtype=like.dtype, device=like.device)
    return interpolate(identity[None], target, mode="linear", align_corners=False)[0].mT


class _SparseRows:
    """A sparse matrix that multiplies every image row of a band, by embedding_bag.

    Faster than torch.nn.functional.interpolate and its backward on channels-last bands, by up to 2x.
    """

    def __init__(self, column: Tensor, start: Tensor, weight: Tensor, columns: int, repeats: int) -> None:
        """Take columns and weights of the entries, the first entry of every row, and the most image rows of a band."""
        self.sizes = len(column), len(start)
        row = torch.arange(repeats, device=column.device)[:, None]
        # Indices of a band's pixels fit in 32 bits.
        self.column = (column + columns * row).int().flatten()
        self.start = (start + len(column) * row).int().flatten()
        self.weight = weight.repeat(repeats)

    def __matmul__(self, pixels: Tensor) -> Tensor:
        """Multiply (n, columns, K) to (n, rows, K)."""
        entries, rows = (n * pixels.shape[0] for n in self.sizes)
        product = embedding_bag(
            self.column[:entries],
            pixels.flatten(0, 1),
            self.start[:rows],
            mode="sum",
            per_sample_weights=self.weight[:entries],
        )
        return product.view(pixels.shape[0], -1, pixels.shape[2])


class UpsampledBands:
    """Logits resized in bands of output rows; only one band is in memory.

    Args:
        logits: (B, K, h, w), any strides.
        size: (H, W) of the output.
    """

    def __init__(self, logits: Tensor, size: tuple[int, int]) -> None:
        _, classes, height, width = logits.shape
        self.logits = logits
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.rows, columns = size
        like = logits.new_empty((), dtype=self.dtype)
        # Indices and weights of a pixel take the memory of about 8 classes.
        self.band = max(1, min(self.rows, BAND_BYTES // (columns * (classes + 8) * like.itemsize)))
        self.class_axis = 2 if classes >= _CLASSES_LAST else 0
        self.row_index, self.row_weight = linear_taps(height, self.rows, like)
        self.column_taps = [x.flatten() for x in linear_taps(width, columns, like)]
        start = torch.arange(0, 2 * columns, 2, device=like.device)
        self.columns = _SparseRows(self.column_taps[0], start, self.column_taps[1], width, self.band)

    @cached_property
    def columns_transposed(self) -> _SparseRows:
        """Return the transpose of the matrix that resizes columns; its row j begins where the sorted taps reach j."""
        index, weight = self.column_taps
        sorted_index, order = index.sort(stable=True)
        start = torch.searchsorted(sorted_index, torch.arange(self.logits.shape[3], device=index.device))
        return _SparseRows(order // 2, start, weight[order], len(index) // 2, self.band)

    def images(self) -> Iterator[Tensor]:
        """Yield every image's logits (h, w, K)."""
        return (image.permute(1, 2, 0).to(self.dtype).contiguous() for image in self.logits)

    def __iter__(self) -> Iterator[slice]:
        """Yield the output rows of every band."""
        return (slice(start, min(start + self.band, self.rows)) for start in range(0, self.rows, self.band))

    def upsample(self, image: Tensor, rows: slice) -> Tensor:
        """Return output rows (n, W, K) of an image (h, w, K)."""
        before, after = self.row_index[rows].unbind(1)
        weight = self.row_weight[rows, 1, None, None]
        return self.columns @ image.index_select(0, before).lerp_(image.index_select(0, after), weight)

    def upsample_for_reduction(self, image: Tensor, rows: slice) -> Tensor:
        """Return what ``upsample`` does, with the classes on ``class_axis``, where reducing them is fastest."""
        return self.upsample(image, rows).movedim(2, self.class_axis).contiguous()

    def add_transposed(self, image: Tensor, rows: slice, grad: Tensor) -> None:
        """Add to the gradient of an image (h, w, K) the contribution of the gradient (n, W, K) of output rows."""
        grad = self.columns_transposed @ grad
        for index, weight in zip(self.row_index[rows].unbind(1), self.row_weight[rows].unbind(1), strict=True):
            image.index_add_(0, index, grad * weight[:, None, None])
