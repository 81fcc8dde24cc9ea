"""Bilinear upsampling, argmax and its probability as one operator."""

from .op import upsample_argmax

__all__ = ["upsample_argmax"]
