"""Upsample, then argmax, in bands of output rows: logits of the full resolution are never stored."""

import torch
from torch import Tensor

from allspark_fast.kernels.bilinear import UpsampledBands


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute ``reference.upsample_argmax``, for logits of any dtype and strides."""
    bands = UpsampledBands(logits, size)
    labels = torch.empty((len(logits), *size), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(labels.shape, dtype=bands.dtype, device=logits.device)
    for i, image in enumerate(bands.images()):
        for rows in bands:
            band, axis = bands.upsample_for_reduction(image, rows), bands.class_axis
            top, labels[i, rows] = band.max(axis)
            confidence[i, rows] = band.sub_(top.unsqueeze(axis)).exp_().sum(axis).reciprocal_()
    return labels, confidence
