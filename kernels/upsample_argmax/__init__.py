"""Bilinear upsampling, argmax and its probability as one operator."""

from allspark_fast.kernels.upsample_cross_entropy.op import upsample_argmax

__all__ = ["upsample_argmax"]
