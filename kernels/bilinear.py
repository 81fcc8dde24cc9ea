"""Bilinear resizing with align_corners=False: its weights, and resizing in bands of output rows."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate

# Size of a band with its indices: 1 MB was the fastest of 1/8 to 1 MB, with the fewest calls.
BAND_BYTES = 2**20
# Softmax and maximum over a contiguous axis of fewer classes leave most of a vector register empty.
_CLASSES_LAST = 32


def linear_taps(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what torch.nn.functional.interpolate takes from ``source`` positions for each of ``target`` positions.

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


def resize_matrices(source: tuple[int, int], target: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices of rows and columns that resize a map (h, w) to (H, W), the same one if both are square."""
    rows = linear_matrix(source[0], target[0], like)
    square = source[0] == source[1] and target[0] == target[1]
    return rows, rows if square else linear_matrix(source[1], target[1], like)


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
        entries, rows = (n * len(pixels) for n in self.sizes)
        bags, weight = (self.column[:entries], pixels.flatten(0, 1), self.start[:rows]), self.weight[:entries]
        return embedding_bag(*bags, mode="sum", per_sample_weights=weight).unflatten(0, (len(pixels), -1))


class UpsampledBands:
    """Logits (B, K, h, w) of any strides, resized to (H, W) in bands of output rows; only one band is in memory."""

    def __init__(self, logits: Tensor, size: tuple[int, int]) -> None:
        _, classes, height, width = logits.shape
        self.logits, (self.rows, columns) = logits, size
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        like = logits.new_empty((), dtype=self.dtype)
        # Indices and weights of a pixel take the memory of about 8 classes.
        self.band = max(1, min(self.rows, BAND_BYTES // (columns * (classes + 8) * like.itemsize)))
        self.class_axis = 2 if classes >= _CLASSES_LAST else 0
        self.row_index, self.row_weight = linear_taps(height, self.rows, like)
        index, weight = (x.flatten() for x in linear_taps(width, columns, like))
        start = torch.arange(0, 2 * columns, 2, device=like.device)
        self.columns = _SparseRows(index, start, weight, width, self.band)
        # Row j of the transpose begins where the sorted taps reach j.
        index, order = index.sort(stable=True)
        start = torch.searchsorted(index, torch.arange(width, device=like.device))
        self.columns_transposed = _SparseRows(order // 2, start, weight[order], columns, self.band)

    def images(self) -> Iterator[Tensor]:
        """Yield every image's logits (h, w, K)."""
        return (image.permute(1, 2, 0).to(self.dtype).contiguous() for image in self.logits)

    def __iter__(self) -> Iterator[slice]:
        """Yield the output rows of every band."""
        return (slice(start, min(start + self.band, self.rows)) for start in range(0, self.rows, self.band))

    def upsample(self, image: Tensor, rows: slice) -> Tensor:
        """Return output rows (n, W, K) of an image (h, w, K)."""
        before, after = (image.index_select(0, index) for index in self.row_index[rows].unbind(1))
        return self.columns @ before.lerp_(after, self.row_weight[rows, 1, None, None])

    def upsample_for_reduction(self, image: Tensor, rows: slice) -> Tensor:
        """Return what ``upsample`` does, with the classes on ``class_axis``, where reducing them is fastest."""
        return self.upsample(image, rows).movedim(2, self.class_axis).contiguous()

    def add_transposed(self, image: Tensor, rows: slice, grad: Tensor) -> None:
        """Add to the gradient of an image (h, w, K) the contribution of the gradient (n, W, K) of output rows."""
        grad = self.columns_transposed @ grad
        for index, weight in zip(self.row_index[rows].unbind(1), self.row_weight[rows].unbind(1), strict=True):
            image.index_add_(0, index, grad * weight[:, None, None])
