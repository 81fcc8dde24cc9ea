"""Upsample, then cross-entropy, in bands of output rows: logits of the full resolution are never stored."""

import torch
from torch import Tensor

from allspark_fast.kernels.bilinear import UpsampledBands


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute ``reference.forward`` for logits of any dtype and strides, and every pixel's log-sum-exp (B, H, W)."""
    bands = UpsampledBands(logits, (target.shape[1], target.shape[2]))
    loss = torch.empty(target.shape, dtype=bands.dtype, device=target.device)
    lse = torch.empty_like(loss)
    for i, image in enumerate(bands.images()):
        for rows in bands:
            band, axis = bands.upsample_for_reduction(image, rows), bands.class_axis
            valid = target[i, rows] != ignore_index
            label = target[i, rows].where(valid, 0).unsqueeze(axis)
            # Large logits would round the loss and the softmax of backward, but for the shift by the maximum.
            top = band.amax(axis, keepdim=True)
            logit = band.sub_(top).gather(axis, label).squeeze(axis)
            log_sum = band.exp_().sum(axis).log_()
            torch.add(top.squeeze(axis), log_sum, out=lse[i, rows])
            loss[i, rows] = (log_sum - logit).where(valid, 0)
    return loss, lse


def backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """Return the gradient of the logits, in their dtype and strides, given that of every pixel's loss and the LSE."""
    bands = UpsampledBands(logits, (target.shape[1], target.shape[2]))
    grad_logits = torch.empty_like(logits)
    grad_image = logits.new_empty((*logits.shape[2:], logits.shape[1]), dtype=bands.dtype)
    for i, image in enumerate(bands.images()):
        grad_image.zero_()
        for rows in bands:
            label = target[i, rows]
            valid = label != ignore_index
            label = label.where(valid, 0)[..., None]
            # The gradient of a pixel's loss is softmax minus one-hot.
            band = bands.upsample(image, rows).sub_(lse[i, rows, :, None]).exp_()
            band.scatter_add_(2, label, band.new_full((), -1).expand(label.shape))
            band *= grad[i, rows].where(valid, 0)[..., None]
            bands.add_transposed(grad_image, rows, band)
        grad_logits[i] = grad_image.permute(2, 0, 1)
    return grad_logits
