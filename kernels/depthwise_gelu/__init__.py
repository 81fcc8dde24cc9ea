"""A depthwise 3x3 convolution of tokens and GELU as one operator."""

from allspark_fast.kernels.depthwise_gelu.op import depthwise_gelu

__all__ = ["depthwise_gelu"]
