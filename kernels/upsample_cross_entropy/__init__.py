"""Bilinear upsampling and cross-entropy as one operator."""

from .op import upsample_cross_entropy

__all__ = ["upsample_cross_entropy"]
