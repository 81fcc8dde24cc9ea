"""Checks of every operator on a device, against float64 on the CPU: for machines that nobody has tried yet."""

import functools
import importlib
import time
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import reference as depthwise_reference
from allspark_fast.kernels.depthwise_gelu.configs import BACKWARD_TILES, FORWARD_TILES
from allspark_fast.kernels.semantic_memory import reference as memory_reference
from allspark_fast.kernels.triton_support import is_interpreted, why_no_triton
from allspark_fast.kernels.upsample_cross_entropy import reference as cross_entropy_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One computation.

    Attributes:
        op: a name in ``triton_support.TRITON_OPS``.
        name: what is special about it.
        compute: takes a device, a dtype and whether to use Triton; gives results, and in float64 what they should be.
    """

    op: str
    name: str
    compute: Callable[[torch.device, torch.dtype, bool], tuple[Sequence[Tensor], Sequence[Tensor]]]


class Result(NamedTuple):
    """What became of a case.

    Attributes:
        op: as in ``Case``.
        case: its name.
        dtype: such as ``float32``.
        error: max|a - b| / max|b|, the largest of its tensors; NaN if it did not come so far.
        seconds: with compilation.
        failure: why it failed, empty if it passed.
    """

    op: str
    case: str
    dtype: str
    error: float
    seconds: float
    failure: str


def check_kernels(device: torch.device, dtypes: Collection[torch.dtype] | None = None) -> list[Result]:
    """Run all cases, with Triton where its kernels can run at all and in plain torch elsewhere.

    Args:
        device: where to.
        dtypes: which to check; all that work there if None (Triton's interpreter multiplies bfloat16 wrongly).
    """
    triton = why_no_triton(device) is None
    if dtypes is None:
        dtypes = [x for x in TOLERANCE if not (triton and is_interpreted() and x == torch.bfloat16)]
    return [_check(case, device, dtype, triton) for case in CASES for dtype in dtypes]


def passed(results: Sequence[Result]) -> bool:
    """Whether nothing failed."""
    return not any(result.failure for result in results)


def results_table(results: Sequence[Result]) -> str:
    """A line for each result."""
    rows = [("kernel", "dtype", "case", "error", "seconds", "verdict")]
    rows += [(x.op, x.dtype, x.case, f"{x.error:.1e}", f"{x.seconds:.2f}", x.failure or "ok") for x in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _check(case: Case, device: torch.device, dtype: torch.dtype, triton: bool) -> Result:
    start = time.perf_counter()
    error, failure = float("nan"), ""
    try:
        actual, expected = case.compute(device, dtype, triton)
        error = max(_relative_error(x.cpu(), y) for x, y in zip(actual, expected, strict=True))
        if not error <= TOLERANCE[dtype]:
            failure = f"wrong by {error:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    except Exception as problem:  # whatever a compiler or a driver raises
        failure = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    name = str(dtype).removeprefix("torch.")
    return Result(case.op, case.name, name, error, time.perf_counter() - start, failure)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def _random(*shape: int, seed: int) -> Tensor:
    """Float64 on the CPU; torch's own generator is left alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _attention(
    device: torch.device, dtype: torch.dtype, triton: bool, *, tokens: int, dropout_p: float, backward: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Channel counts are multiples of 16, as in models, so that what is compiled here serves them; some are masked."""
    shapes = [(2, 1, tokens, 32), (1, 1, tokens, 96), (1, 1, tokens, 96)]
    inputs = [_random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    weight = _random(*shapes[0], seed=3).to(dtype)

    def run(where: torch.device, computed_in: torch.dtype, backend: str) -> Sequence[Tensor]:
        tensors = [x.to(where, computed_in).requires_grad_(backward) for x in inputs]
        output = channel_attention(
            *tensors,
            group_mask=torch.tensor([True, False, True], device=where) if dropout_p else None,
            dropout_p=dropout_p,
            seed=torch.tensor(1, device=where),
            backend=backend,  # type: ignore[arg-type]
        )
        return torch.autograd.grad(output, tensors, weight.to(where, computed_in)) if backward else [output]

    expected = run(torch.device("cpu"), torch.float64, "reference")
    return run(device, dtype, "triton" if triton else "chunked"), expected


def _grouping(device: torch.device, dtype: torch.dtype, triton: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Similarities of the classes that were chosen, and the largest there are: ties do not matter."""
    features, class_map = (_random(*shape, seed=4).to(dtype) for shape in ((2, 289, 64), (2, 21, 289)))
    similarity = torch.nn.functional.normalize(class_map.double(), dim=2) @ features.double()
    chosen = (
        _module("semantic_memory", "vectorized", triton)
        .channel_semantic_grouping(features.to(device), class_map.to(device))
        .cpu()
    )
    return [similarity.gather(1, chosen[:, None])[:, 0]], [similarity.amax(1)]


def _enqueue(device: torch.device, dtype: torch.dtype, triton: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """More channels than a class has room for, and channels of no class."""
    features = _random(2, 289, 64, seed=5).to(dtype)
    channel_class = torch.arange(2 * 64).view(2, 64) % 7 - 1
    queue, queue_ptr = torch.zeros(289, 5, 16).permute(1, 2, 0), torch.arange(5)
    expected = queue.clone(), queue_ptr.clone()
    memory_reference.semantic_memory_enqueue(*expected, features, channel_class)
    actual = queue.to(device), queue_ptr.to(device)
    _module("semantic_memory", "vectorized", triton).semantic_memory_enqueue(
        *actual, features.to(device), channel_class.to(device)
    )
    return actual, [x.double() for x in expected]


def _loss(device: torch.device, dtype: torch.dtype, triton: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every pixel's loss and the gradient of the logits; some pixels are ignored."""
    logits, grad = _random(2, 21, 5, 13, seed=6).to(dtype), _random(2, 17, 49, seed=7)
    target = torch.arange(2 * 17 * 49).view(2, 17, 49) % 22
    module = _module("upsample_cross_entropy", "chunked", triton)
    logits_there, target_there = logits.to(device), target.to(device)
    loss, lse = module.forward(logits_there, target_there, 21)
    grad_logits = module.backward(grad.float().to(device), logits_there, target_there, lse, 21)
    expected = cross_entropy_reference.forward(logits.double(), target, 21)
    return [loss, grad_logits], [expected, cross_entropy_reference.backward(grad, logits.double(), target, 21)]


def _argmax(device: torch.device, dtype: torch.dtype, triton: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The probability of the labels chosen, their confidence, and for both the largest there is: ties do not matter."""
    logits = _random(2, 21, 5, 13, seed=8).to(dtype)
    labels, confidence = _module("upsample_argmax", "chunked", triton).upsample_argmax(logits.to(device), (17, 49))
    full = torch.nn.functional.interpolate(logits.double(), (17, 49), mode="bilinear", align_corners=False).softmax(1)
    largest = full.amax(1)
    return [full.gather(1, labels.cpu()[:, None])[:, 0], confidence], [largest, largest]


def _depthwise(device: torch.device, dtype: torch.dtype, triton: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Output and gradients on a map that fills no tile, with float32 weights, as under autocast."""
    size, channels = (19, 11), 80
    tokens, grad = (_random(2, 19 * 11, channels, seed=seed).to(dtype) for seed in (9, 10))
    weight, bias = _random(channels, 1, 3, 3, seed=11).float(), _random(channels, seed=12).float()
    wide = tokens.double(), weight.double(), bias.double()
    expected = [depthwise_reference.forward(*wide, size), *depthwise_reference.backward(grad.double(), *wide, size)]
    module = _module("depthwise_gelu", "reference", triton)
    grad, there = grad.to(device), [x.to(device) for x in (tokens, weight, bias)]
    if not triton:
        return [module.forward(*there, size), *module.backward(grad, *there, size)], expected
    actual: list[Tensor] = []
    # Any of these may be the fastest at the size of a training step.
    choices = list(zip(FORWARD_TILES, BACKWARD_TILES, strict=True))[: 1 if is_interpreted() else None]
    for forward_tile, backward_tile in choices:
        actual += [module.forward(*there, size, forward_tile), *module.backward(grad, *there, size, backward_tile)]
    return actual, len(choices) * expected


def _module(folder: str, plain: str, triton: bool) -> ModuleType:
    """An operator's kernels, or what takes their place; imported only then, since triton is optional."""
    return importlib.import_module(f"allspark_fast.kernels.{folder}.{'kernel' if triton else plain}")


# 289 tokens are those of Pascal's crops, which have a kernel of their own on some GPUs; 676 are Cityscapes'.
CASES = [
    *(
        Case(
            "channel_attention",
            f"{'backward' if backward else 'forward'}, {tokens} tokens, {text}",
            functools.partial(_attention, tokens=tokens, dropout_p=dropout_p, backward=backward),
        )
        for tokens, dropout_p, text in ((289, 0.1, "dropout, masked groups"), (676, 0.0, "plain"))
        for backward in (False, True)
    ),
    Case("upsample_cross_entropy", "forward and backward, ignored pixels", _loss),
    Case("upsample_argmax", "21 classes", _argmax),
    Case("depthwise_gelu", "forward and backward, float32 weights", _depthwise),
    Case("channel_semantic_grouping", "21 classes", _grouping),
    Case("semantic_memory_enqueue", "classes that overflow", _enqueue),
]
