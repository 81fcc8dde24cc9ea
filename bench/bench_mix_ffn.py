"""The Mix-FFN of each stage of an encoder: how its convolution takes tokens, and what is kept for backward."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.model.mit import MIT_CONFIGS, STRIDES, DepthwiseConv, MixFFN
from bench.harness import UNAVAILABLE, Case
from bench.naive_model import NaiveDepthwiseConv, NaiveMixFFN
from bench.step_variants import SIZES

_NEEDS_GPU = {"operator": "needs a GPU"}


def cases(size: str) -> list[Case]:
    """One case for each stage, on all images of a training step.

    Variants are ``naive`` (tokens are copied to a contiguous map and back), ``channels last`` (the convolution takes
    them as they are), ``recomputed`` (that, and convolution and GELU are computed again in backward: ours on a CPU) and
    ``operator`` (the same with convolution and GELU as one operator: ours on a GPU).
    """
    step = SIZES[size]
    config = MIT_CONFIGS[step.backbone]
    return [
        _case(f"{size}, stage {stage}", 2 * step.batch, channels, config.mlp_ratio * channels, -(-step.crop // stride))
        for stage, (channels, stride) in enumerate(zip(config.embed_dims, STRIDES, strict=True), 1)
    ]


def _case(name: str, batch: int, channels: int, hidden: int, side: int) -> Case:
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    ours = MixFFN(channels, hidden).to(device, dtype)
    tokens = torch.randn(batch, side * side, channels, device=device, dtype=dtype, requires_grad=True)
    modules = {
        "naive": _with_weights_of(ours, NaiveMixFFN(channels, hidden), NaiveDepthwiseConv(hidden)),
        "channels last": _with_weights_of(ours, NaiveMixFFN(channels, hidden), DepthwiseConv(hidden)),
        "recomputed": _with_weights_of(ours, _TorchMixFFN(channels, hidden), ours.dwconv),
    }
    if cuda:
        modules["operator"] = ours
    compiled = {f"{name}, compiled": torch.compile(module) for name, module in modules.items()}
    entries = batch * side * side
    products = 2.0 * entries * hidden * (2 * channels + 9)
    return Case(
        op="mix_ffn",
        size=f"{name}: B={batch} C={channels} hidden={hidden} {side} x {side} {dtype}",
        variants={
            name: functools.partial(module, tokens, (side, side)) for name, module in (modules | compiled).items()
        },
        inputs=(tokens, *ours.parameters()),
        comparators=tuple(compiled) if cuda else (),
        unavailable={} if cuda else dict.fromkeys(compiled, UNAVAILABLE["naive, compiled"]) | _NEEDS_GPU,
        flops=(products, 2 * products),
        moved=3.0 * (2 * tokens.nbytes + sum(x.nbytes for x in ours.parameters())),
        dtype=dtype,
        tolerance=3e-2 if cuda else 1e-4,
    )


class _TorchMixFFN(MixFFN):
    """Convolution and GELU by torch on a GPU too."""

    def _activate(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        return F.gelu(self.dwconv(hidden, size))


def _with_weights_of(source: MixFFN, target: MixFFN, convolution: DepthwiseConv) -> MixFFN:
    """The target computing with the very parameters of the source, of which gradients are taken."""
    target.fc1, target.fc2, target.dwconv = source.fc1, source.fc2, convolution
    convolution.dwconv = source.dwconv.dwconv
    return target
