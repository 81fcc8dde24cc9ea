"""BatchNorm that synchronizes over ranks and whose running statistics survive a bad batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.distributed import all_reduce_mean, world_size


class FiniteBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running statistics skip non-finite batches, so that one bad image spoils one step only.

    Statistics of training are those of all ranks, whose batches must have one shape (B, C, ...), of any number of axes:
    synchronized BatchNorm, which torch has for GPUs only.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, feature_map: Tensor) -> Tensor:
        """Normalize (B, C, ...) and, in training, update the running statistics."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(feature_map, mean, var, self.weight, self.bias, eps=self.eps)
        feature_map, mean, var = self.normalize(feature_map)
        self.update_statistics(mean, var)
        return feature_map

    def normalize(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map (B, C, ...) normalized by its own statistics, its mean and unbiased variance, (C,) each."""
        # Without side effects, so that checkpointing may run it again.
        if world_size() > 1:
            return self._normalize_over_ranks(feature_map)
        # With momentum 1, F.batch_norm writes the statistics of the batch into them.
        mean, var = self.weight.new_zeros(2, self.num_features)
        feature_map = F.batch_norm(feature_map, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        return feature_map, mean, var

    def _normalize_over_ranks(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        computed = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
        own_var, own_mean = torch.var_mean(computed, (0, *range(2, computed.ndim)), correction=0)
        mean = all_reduce_mean(own_mean)
        var = all_reduce_mean(own_var + (own_mean - mean).square())
        scale = self.weight * torch.rsqrt(var + self.eps)
        shape = (-1, *(1 for _ in range(2, computed.ndim)))
        normalized = (computed - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        count = world_size() * feature_map.numel() // feature_map.shape[1]
        unbiased = var.detach() * (count / max(count - 1, 1))
        return normalized.to(feature_map.dtype), mean.detach(), unbiased

    def update_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics with a batch's mean and variance (C,), channel by channel where finite."""
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(running.lerp(batch, self.momentum).where(batch.isfinite(), running))
        self.num_batches_tracked += 1

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return eval mode as an affine map: scale and shift of each channel, (C,)."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale
