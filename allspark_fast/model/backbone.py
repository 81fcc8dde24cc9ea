"""What every encoder has in common."""

from collections.abc import Sequence

from torch import nn


class Backbone(nn.Module):
    """An encoder: maps images (B, 3, H, W) to four feature maps, finest first.

    Attributes:
        channels: channels of the four maps.
        stride: stride of the deepest map, in pixels.
        min_size: smallest height and width of an image, in pixels, that the encoder takes.
    """

    channels: tuple[int, ...]
    stride: int
    min_size: int = 1

    def deepest_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Return (h, w) of the deepest map for images of ``image_size`` = (H, W) pixels, both rounded up."""
        # torch.export cannot trace math.ceil, and ONNX would round -(-x // y) toward zero.
        height, width = (side + self.stride - 1 for side in image_size)
        return height // self.stride, width // self.stride
