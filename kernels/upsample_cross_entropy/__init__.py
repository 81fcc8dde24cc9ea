"""Bilinear upsampling and cross-entropy as one operator."""

from allspark_fast.kernels.upsample_cross_entropy.op import upsample_cross_entropy

__all__ = ["upsample_cross_entropy"]
