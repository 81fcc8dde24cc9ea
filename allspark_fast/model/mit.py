"""Mix Transformer encoders MiT-B0 to B5 (SegFormer, Xie et al. 2021, sec. 3.1), tokens channels-last throughout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.errors import InputError
from allspark_fast.kernels.arguments import FLOATING, check_tensor
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.model.common import Backbone, Named, checkpointed, map_size, to_autocast, to_map, to_tokens


@dataclass(frozen=True, kw_only=True)
class MiTConfig:
    """Channels, blocks, heads and spatial reduction of the four stages, and the last block's rate of drop path."""

    embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    drop_path: float = 0.1


STRIDES = (4, 8, 16, 32)
MIT_CONFIGS = {
    # Not in the paper; for tests and the embedded data: half of B0's widths, one block a stage.
    "mit_tiny": MiTConfig(embed_dims=(16, 32, 80, 128), depths=(1, 1, 1, 1)),
    "mit_b0": MiTConfig(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "mit_b1": MiTConfig(depths=(2, 2, 2, 2)),
    "mit_b2": MiTConfig(depths=(3, 4, 6, 3)),
    "mit_b3": MiTConfig(depths=(3, 4, 18, 3)),
    "mit_b4": MiTConfig(depths=(3, 8, 27, 3)),
    "mit_b5": MiTConfig(depths=(3, 6, 40, 3)),
}


class MixTransformer(Backbone):
    """A hierarchical transformer encoder with overlapping patches; parameter names are those of the released weights.

    With ``activation_checkpointing``, backward computes each block again from its input.
    """

    stride = STRIDES[-1]

    def __init__(self, config: MiTConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.channels = config.embed_dims
        # The spatial reduction of each stage needs at least one whole window of its map.
        self.min_size = max((ratio - 1) * stride + 1 for ratio, stride in zip(config.sr_ratios, STRIDES, strict=True))
        self.num_blocks = sum(config.depths)
        self.drop_path = config.drop_path
        stages = zip(config.embed_dims, config.depths, config.num_heads, config.sr_ratios, strict=True)
        in_channels = 3
        for stage, (channels, depth, heads, sr_ratio) in enumerate(stages, 1):
            patch, stride = (7, 4) if stage == 1 else (3, 2)
            blocks = [Block(channels, heads, sr_ratio) for _ in range(depth)]
            # Flat names instead of a list of stages, for the released weights.
            proj = nn.Conv2d(in_channels, channels, patch, stride, padding=patch // 2)
            setattr(self, f"patch_embed{stage}", Named(proj=proj, norm=nn.LayerNorm(channels, eps=1e-5)))
            setattr(self, f"block{stage}", nn.ModuleList(blocks))
            setattr(self, f"norm{stage}", nn.LayerNorm(channels, eps=1e-6))
            in_channels = channels
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W) of at least ``min_size`` pixels a side, 29 for MiT-B0 to B5.

        Returns:
            four maps (B, channels[i], ⌈H / s⌉, ⌈W / s⌉) for the strides s = 4, 8, 16, 32, channels-last in memory.

        Raises:
            TypeError, ValueError: the images are not a float tensor, do not have 3 channels, or are too small.
        """
        check_tensor("images", images, "(B, 3, H, W)", FLOATING)
        height, width = map_size(images)
        if min(height, width) < self.min_size:
            raise ValueError(f"images are {height} x {width} pixels, expected at least {self.min_size} a side")
        features, feature_map = [], images
        scales = iter(self.draw_scales(images))
        for stage in range(1, 5):
            embed = getattr(self, f"patch_embed{stage}")  # patches overlap
            tokens, size = _convolve(embed.proj, feature_map)
            tokens = embed.norm(tokens)
            for block in getattr(self, f"block{stage}"):
                arguments = tokens, size, next(scales)
                tokens = checkpointed(block, *arguments) if self.activation_checkpointing else block(*arguments)
            feature_map = to_map(getattr(self, f"norm{stage}")(tokens), size)
            features.append(feature_map)
        return features

    def draw_scales(self, images: Tensor) -> Sequence[Tensor | None]:
        """Draw stochastic depth for all blocks at once: scales (2, B, 1, 1) of each block's branches; None if off."""
        if not self.training or self.drop_path == 0:
            return [None] * self.num_blocks
        drop = torch.linspace(0, self.drop_path, self.num_blocks, dtype=images.dtype, device=images.device)
        keep = (1 - drop).view(-1, 1, 1, 1, 1)
        return (torch.bernoulli(keep.expand(-1, 2, len(images), 1, 1)) / keep).unbind()


def _convolve(conv: nn.Conv2d, feature_map: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Convolve a map (B, C, H, W) to tokens (B, h·w, channels); returns them and (h, w)."""
    assert conv.bias is not None
    feature_map = F.conv2d(feature_map, conv.weight, None, conv.stride, conv.padding)
    # Under autocast the sum is in the bias's float32, which LayerNorm would cast it to.
    return to_tokens(feature_map) + conv.bias, map_size(feature_map)


class Block(nn.Module):
    """A pre-norm transformer block: efficient self-attention, then Mix-FFN, both with stochastic depth."""

    def __init__(self, channels: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = EfficientSelfAttention(channels, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels, 4 * channels)

    def forward(self, tokens: Tensor, size: tuple[int, int], scales: Tensor | None = None) -> Tensor:
        """Transform tokens (B, h·w, C) of a map (h, w); ``scales`` (2, B, 1, 1) multiply the branches of samples."""
        attn_scale, mlp_scale = (None, None) if scales is None else scales
        tokens = _add(tokens, self.attn(self.norm1(tokens), size), attn_scale)
        return _add(tokens, self.mlp(self.norm2(tokens), size), mlp_scale)


def _add(tokens: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return tokens + branch if scale is None else _ScaledAdd.apply(tokens, branch, scale)


class _ScaledAdd(torch.autograd.Function):
    """tokens + branch · scale in one launch, and the branch's gradient in its own dtype in another."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = branch.dtype
        with torch.autocast(tokens.device.type, enabled=False):  # it would cast the branch first
            return torch.addcmul(tokens, branch, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, torch.mul(grad, scale, out=torch.empty_like(grad, dtype=ctx.dtype)), None


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any]) -> None:
    """Compile the Mix Transformer blocks of a model in place, one graph for a stage; InputError if it has none."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise InputError("only blocks of mit_* can be compiled, this model has none: set train.compile auto or off")
    # The blocks share one function, for which torch keeps at most 8 graphs by default: enough for four stages, with and
    # without stochastic depth, in training and in evaluation, at a few sizes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    forward = torch.compile(Block.forward, fullgraph=True, dynamic=False, backend=backend)
    for block in blocks:
        block.forward = MethodType(forward, block)  # type: ignore[method-assign]


class EfficientSelfAttention(nn.Module):
    """Self-attention whose keys come from windows of ``sr_ratio`` x ``sr_ratio`` tokens (SegFormer eq. 2)."""

    def __init__(self, channels: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend among tokens (B, h·w, C) of a map (h, w); returns the same shape."""
        tokens = to_autocast(tokens)
        query = self.q(tokens).unflatten(2, (self.num_heads, -1))
        reduced = self.norm(_convolve(self.sr, to_map(tokens, size))[0]) if self.sr_ratio > 1 else tokens
        key, value = self.kv(reduced).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return self.proj(attended.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """A feed-forward layer with a depthwise 3x3 convolution, which replaces positional encodings (SegFormer eq. 3)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = Named(dwconv=nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Transform tokens (B, h·w, C) of a map (h, w); returns the same shape."""
        # Convolution and GELU are cheap to recompute, so backward keeps only the output of fc1.
        return checkpointed(self._mix, self.fc1(tokens), size)

    def _mix(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        # Decided by the device alone, which tracing and export know; the operator chooses its own implementation.
        conv = self.dwconv.dwconv
        if hidden.is_cuda:
            assert conv.bias is not None
            return self.fc2(depthwise_gelu(hidden, conv.weight, conv.bias, size))
        return self.fc2(F.gelu(to_tokens(conv(to_map(hidden, size)))))


def _init_weights(module: nn.Module) -> None:
    """Initialize as the reference implementation: truncated normal for linears, He (fan-out) for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        # The layout of the maps, to which each call would convert its weights.
        module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
