"""The all-MLP decoder of SegFormer (Xie et al. 2021, sec. 3.2), its linear layers merged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.kernels.bilinear import resize_matrices
from allspark_fast.model.batch_norm import FiniteBatchNorm
from allspark_fast.model.common import Named, checkpointed, map_size, to_map, to_tokens


class SegFormerHead(nn.Module):
    """Fuses four feature maps into class logits of the finest map's size.

    The head is linear up to its BatchNorm: fuse(concat_i(up(A_i c_i + b_i))) = Σ_i up(W_i A_i c_i + W_i b_i), where
    W_i are the columns of the fusing convolution for map i. Computing W_i A_i first moves the convolution to the low
    resolutions and avoids the map of 4E channels. The state_dict is that of the reference implementation.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, embedding_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear_c4 = Named(proj=nn.Linear(in_channels[3], embedding_dim))
        self.linear_c3 = Named(proj=nn.Linear(in_channels[2], embedding_dim))
        self.linear_c2 = Named(proj=nn.Linear(in_channels[1], embedding_dim))
        self.linear_c1 = Named(proj=nn.Linear(in_channels[0], embedding_dim))
        conv = nn.Conv2d(4 * embedding_dim, embedding_dim, 1, bias=False)
        self.linear_fuse = Named(conv=conv, bn=FiniteBatchNorm(embedding_dim))
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(embedding_dim, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map four maps (B, in_channels[i], h_i, w_i), finest first, to logits (B, K, h_0, w_0)."""
        fused = self._fuse(features)
        # In the dtype of the classifier's weights, since 1 / (1 - p) in half precision would not preserve the mean.
        kept = F.dropout(self.linear_pred.weight.new_ones(fused.shape[:2]), self.dropout.p, self.training)
        norm = self.linear_fuse.bn
        if not norm.training:
            return self._classify(fused.relu_(), kept)
        # Backward keeps only the input of BatchNorm and recomputes its output and that of ReLU.
        logits, mean, var = checkpointed(self._normalize_and_classify, fused, kept)
        norm.update_statistics(mean, var)
        return logits

    def _fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the linear part, in eval mode with BatchNorm folded in: four maps to (B, E, h_0, w_0)."""
        # The reference implementation concatenates the deepest map first.
        layers = [x.proj for x in (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)]
        columns = self.linear_fuse.conv.weight.flatten(1)
        # Resizing preserves constants, so all biases are added where that costs least: to the deepest map.
        bias = _product(columns, torch.cat([x.bias for x in layers]))
        weights = [_product(column, x.weight) for column, x in zip(columns.chunk(4, dim=1), layers, strict=True)]
        if not self.linear_fuse.bn.training:
            scale, shift = self.linear_fuse.bn.scale_and_shift()
            weights, bias = [scale[:, None] * weight for weight in weights], scale * bias + shift
        biases = (bias, None, None, None)
        maps = (
            to_map(F.linear(to_tokens(x), weight, added), map_size(x))
            for x, weight, added in zip(reversed(features), weights, biases, strict=True)
        )
        # On a GPU, backward of interpolate is slow and adds atomically; on a CPU, products would take longer.
        if features[0].is_cuda:
            *coarse, finest = maps
            return add_by_products(finest, coarse)
        size = map_size(features[0])
        fused = _resize(next(maps), size)
        for x in maps:
            fused.add_(_resize(x, size))
        return fused

    def _normalize_and_classify(self, fused: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalized, mean, var = self.linear_fuse.bn.normalize(fused)
        return self._classify(normalized.relu_(), kept), mean, var

    def _classify(self, fused: Tensor, kept: Tensor) -> Tensor:
        """Scale the channels of a map (B, E, h, w) by ``kept`` (B, E), on the classifier's weights, and classify."""
        weight = self.linear_pred.weight.flatten(1) * kept[:, None]  # (B, K, E)
        assert self.linear_pred.bias is not None
        logits = torch.baddbmm(self.linear_pred.bias, to_tokens(fused), weight.mT)
        return to_map(logits, map_size(fused))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply weights in at least float32, under autocast too: only the product may be rounded."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _resize(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if map_size(feature) == size else F.interpolate(feature, size, mode="bilinear", align_corners=False)


def add_by_products(fused: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Add channels-last maps (B, C, h, w) to one (B, C, H, W), resized as by interpolate, without copying any."""
    batch, _, height, width = fused.shape
    lines = fused.permute(0, 2, 3, 1).flatten(0, 1)  # (B·H, W, C)
    for x in maps:
        rows, columns = resize_matrices(map_size(x), (height, width), x)
        tall = rows.expand(batch, -1, -1) @ x.permute(0, 2, 3, 1).flatten(2)  # (B, H, w·C)
        low = tall.view(batch * height, x.shape[3], -1)
        lines = torch.baddbmm(lines, columns.expand(batch * height, -1, -1), low)
    return lines.unflatten(0, (batch, height)).permute(0, 3, 1, 2)
