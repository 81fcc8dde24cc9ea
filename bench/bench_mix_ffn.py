"""The Mix-FFN of each stage of an encoder: how its convolution takes tokens, and what is saved for backward."""

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.model.activation_checkpointing import checkpointed
from allspark_fast.model.mit import MIT_CONFIGS, STRIDES, MixFFN
from bench.bench_train_step import SIZES
from bench.harness import UNAVAILABLE, Case
from bench.naive import naive_depthwise_conv


def cases(size: str) -> list[Case]:
    """Return one case for each stage, on all images of a training step.

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
    ffn, size = MixFFN(channels, hidden).to(device, dtype), (side, side)
    tokens = torch.randn(batch, side * side, channels, device=device, dtype=dtype, requires_grad=True)

    def mix(hidden_tokens: Tensor) -> Tensor:
        return ffn.fc2(F.gelu(ffn.dwconv(hidden_tokens, size)))

    variants = {
        "naive": lambda: ffn.fc2(F.gelu(naive_depthwise_conv(ffn.dwconv, ffn.fc1(tokens), size))),
        "channels last": lambda: mix(ffn.fc1(tokens)),
        "recomputed": lambda: checkpointed(mix, ffn.fc1(tokens)),
        "operator": lambda: ffn(tokens, size),
    }
    compiled = {f"{name}, compiled": torch.compile(variant) for name, variant in variants.items()}
    on_cpu = dict.fromkeys(compiled, UNAVAILABLE.get("naive, compiled", "")) | {"operator": "needs a GPU"}
    products = 2.0 * batch * side * side * hidden * (2 * channels + 9)
    return Case(
        op="mix_ffn",
        size=f"{name}: B={batch} C={channels} hidden={hidden} {side} x {side} {dtype}",
        variants=variants | compiled,
        inputs=(tokens, *ffn.parameters()),
        comparators=tuple(compiled),
        unavailable={} if cuda else on_cpu,
        flops=(products, 2 * products),
        moved=3.0 * (2 * tokens.nbytes + sum(x.nbytes for x in ffn.parameters())),
        dtype=dtype,
        tolerance=3e-2 if cuda else 1e-4,
    )
