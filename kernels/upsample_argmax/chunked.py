"""Upsample, then argmax, in bands of output rows: full-resolution logits never exist."""

import torch
from torch import Tensor

from allspark_fast.kernels.bilinear import UpsampledBands


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As in ``reference``, for logits of any dtype and strides."""
    bands = UpsampledBands(logits, size)
    labels = torch.empty((len(logits), *size), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(labels.shape, dtype=bands.dtype, device=logits.device)
    # Vectorises, unlike argmax: the first maximum is the one of the highest rank.
    rank = torch.arange(logits.shape[1], 0, -1, dtype=bands.dtype, device=logits.device)
    rank = rank[:, None, None].movedim(0, bands.class_axis)
    for i, image in enumerate(bands.images()):
        for rows in bands:
            band, axis = bands.upsample_for_reduction(image, rows), bands.class_axis
            top = (band == band.amax(axis, keepdim=True)).logical_or_(band.isnan())
            labels[i, rows] = logits.shape[1] - (top * rank).amax(axis).long()
            confidence[i, rows] = band.log_softmax(axis).amax(axis).exp_()
    return labels, confidence
