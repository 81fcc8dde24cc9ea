"""Checks of every operator on a device against its reference in float64: for machines that nobody has tried yet."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from allspark_fast.kernels import channel_attention as attention
from allspark_fast.kernels import depthwise_gelu, semantic_memory, upsample_argmax, upsample_cross_entropy
