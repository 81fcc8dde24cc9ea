"""Upsample, then cross-entropy or argmax, in bands of output rows: logits of the full resolution are never stored."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from allspark_fast.kernels.bilinear import linear_taps

# Size of a band with its indices: 1 MB was the fastest of 1/8 to 1 MB, with the fewest calls.
BAND_BYTES = 2**20
# Softmax and maximum over a contiguous axis of fewer classes leave most of a vector register empty.
_CLASSES_LAST = 32


class _SparseRows:
    """A sparse matrix times every row of a band, by embedding_bag: up to twice as fast as interpolate."""

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


class _UpsampledBands:
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

    def __iter__(self) -> Iterator[tuple[tuple[int, slice], Tensor]]:
        """Yield of every band where it lies, image and output rows, and its logits (n, W, K)."""
        for i, logits in enumerate(self.logits):
            image = logits.permute(1, 2, 0).to(self.dtype).contiguous()
            for start in range(0, self.rows, self.band):
                rows = slice(start, min(start + self.band, self.rows))
                before, after = (image.index_select(0, index) for index in self.row_index[rows].unbind(1))
                yield (i, rows), self.columns @ before.lerp_(after, self.row_weight[rows, 1, None, None])

    def for_reduction(self) -> Iterator[tuple[tuple[int, slice], Tensor]]:
        """Yield the same with the classes on ``class_axis``, where reducing them is fastest."""
        return ((place, band.movedim(2, self.class_axis).contiguous()) for place, band in self)

    def add_transposed(self, image: Tensor, rows: slice, grad: Tensor) -> None:
        """Add to the gradient of an image (h, w, K) the contribution of the gradient (n, W, K) of output rows."""
        grad = self.columns_transposed @ grad
        for index, weight in zip(self.row_index[rows].unbind(1), self.row_weight[rows].unbind(1), strict=True):
            image.index_add_(0, index, grad * weight[:, None, None])


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute ``reference.forward`` for logits of any dtype and strides, and every pixel's log-sum-exp (B, H, W)."""
    bands = _UpsampledBands(logits, (target.shape[1], target.shape[2]))
    axis, loss = bands.class_axis, torch.empty(target.shape, dtype=bands.dtype, device=target.device)
    lse = torch.empty_like(loss)
    for place, band in bands.for_reduction():
        valid = target[place] != ignore_index
        label = target[place].where(valid, 0).unsqueeze(axis)
        # Large logits would round the loss and the softmax of backward, but for the shift by the maximum.
        top = band.amax(axis, keepdim=True)
        logit = band.sub_(top).gather(axis, label).squeeze(axis)
        log_sum = band.exp_().sum(axis).log_()
        torch.add(top.squeeze(axis), log_sum, out=lse[place])
        loss[place] = (log_sum - logit).where(valid, 0)
    return loss, lse


def backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """Return the gradient of the logits, in their dtype and strides, given that of every pixel's loss and the LSE."""
    bands = _UpsampledBands(logits, (target.shape[1], target.shape[2]))
    grad_images = torch.zeros_like(logits.permute(0, 2, 3, 1), dtype=bands.dtype, memory_format=torch.contiguous_format)
    for place, band in bands:
        valid = target[place] != ignore_index
        label = target[place].where(valid, 0)[..., None]
        # The gradient of a pixel's loss is softmax minus one-hot.
        band.sub_(lse[place][..., None]).exp_().scatter_add_(2, label, band.new_full((), -1).expand(label.shape))
        band.mul_(grad[place].where(valid, 0)[..., None])
        bands.add_transposed(grad_images[place[0]], place[1], band)
    return torch.empty_like(logits).copy_(grad_images.permute(0, 3, 1, 2))


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute ``reference.upsample_argmax``, for logits of any dtype and strides."""
    bands = _UpsampledBands(logits, size)
    labels = torch.empty((len(logits), *size), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(labels.shape, dtype=bands.dtype, device=logits.device)
    for place, band in bands.for_reduction():
        top, labels[place] = band.max(bands.class_axis)
        confidence[place] = band.sub_(top.unsqueeze(bands.class_axis)).exp_().sum(bands.class_axis).reciprocal_()
    return labels, confidence
