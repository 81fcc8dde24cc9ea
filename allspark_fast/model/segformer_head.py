"""The all-MLP decoder of SegFormer (Xie et al. 2021, sec. 3.2), with its linear layers multiplied out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokens import pointwise, to_map, to_tokens


class SegFormerHead(nn.Module):
    """Fuses four feature maps into class logits at the resolution of the finest.

    The head is linear up to its BatchNorm: fuse(concat_i(up(A_i c_i + b_i))) = Σ_i up(W_i A_i c_i + W_i b_i), where
    W_i are the fusing convolution's columns for map i. Multiplying W_i A_i first moves the convolution to the low
    resolutions and leaves no map of 4E channels. Parameters and state_dict are those of the official head.

    Args:
        in_channels: channels of the four maps, finest first.
        num_classes: number of classes K.
        embedding_dim: channels E of the fused map.
        dropout: probability of dropping a channel of the fused map in training.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, embedding_dim: int = 768, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.linear_c4 = _Projection(in_channels[3], embedding_dim)
        self.linear_c3 = _Projection(in_channels[2], embedding_dim)
        self.linear_c2 = _Projection(in_channels[1], embedding_dim)
        self.linear_c1 = _Projection(in_channels[0], embedding_dim)
        self.linear_fuse = _Fuse(embedding_dim)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(embedding_dim, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Classify.

        Args:
            features: four maps (B, in_channels[i], h_i, w_i), finest first.

        Returns:
            logits (B, K, h_0, w_0).
        """
        # In place: backward needs the input of BatchNorm and the output of ReLU, nothing needs what is between.
        fused = F.relu_(self.linear_fuse.bn(self._fuse(features)))
        return self._classify(fused)

    def _fuse(self, features: Sequence[Tensor]) -> Tensor:
        """The linear part: maps of any resolution to one of E channels at that of the finest."""
        size = (features[0].shape[2], features[0].shape[3])
        # The official concatenation starts with the deepest map.
        layers = [x.proj for x in (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)]
        columns = self.linear_fuse.conv.weight.flatten(1)
        weights = [_product(column, x.weight) for column, x in zip(columns.chunk(4, dim=1), layers, strict=True)]
        # Resizing leaves a constant as it is, so all biases go where they cost least: on the deepest map.
        bias = _product(columns, torch.cat([x.bias for x in layers]))
        fused = _upsample(_linear(features[3], weights[0], bias), size)
        for feature, weight in zip(reversed(features[:3]), weights[1:], strict=True):
            fused.add_(_upsample(_linear(feature, weight), size))
        return fused

    def _classify(self, fused: Tensor) -> Tensor:
        """Dropout of whole channels of each sample, then the classifier; the former on the weights of the latter."""
        size = (fused.shape[2], fused.shape[3])
        if not self.training or self.dropout.p == 0:
            return to_map(pointwise(self.linear_pred, to_tokens(fused)), size)
        kept = F.dropout(fused.new_ones(fused.shape[:2]), self.dropout.p)
        weight = self.linear_pred.weight.flatten(1) * kept[:, None]  # (B, K, E)
        assert self.linear_pred.bias is not None
        return to_map(torch.baddbmm(self.linear_pred.bias, to_tokens(fused), weight.mT), size)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A product of weights: rounding it to half precision would err more than rounding each of them."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _linear(feature: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of a map at its own resolution."""
    return to_map(F.linear(to_tokens(feature), weight, bias), (feature.shape[2], feature.shape[3]))


def _upsample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[2:] == size:
        return feature
    return F.interpolate(feature, size, mode="bilinear", align_corners=False)


class _Projection(nn.Module):
    """Holds a linear layer under the official name ``linear_c*.proj``."""

    def __init__(self, in_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, embedding_dim)


class _Fuse(nn.Module):
    """Holds the fusing convolution and its norm under the official names ``linear_fuse.conv`` and ``.bn``."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * embedding_dim, embedding_dim, 1, bias=False)
        self.bn = FiniteBatchNorm2d(embedding_dim)


class FiniteBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose running statistics skip batches that are not finite: one bad image spoils one step only."""

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if not self.training:
            return super().forward(feature_map)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()
        feature_map = F.batch_norm(feature_map, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.where(mean.isfinite(), self.running_mean))
        self.running_var.copy_(var.where(var.isfinite(), self.running_var))
        self.num_batches_tracked += 1
        return feature_map
