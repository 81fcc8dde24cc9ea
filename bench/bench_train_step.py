"""The training step of the reference implementation against ours: whole, by parts, its memory and FLOPs."""

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bench.harness import Moment, Record, device_rates, peak_bytes, percentile, seconds_between, stamp, table
from bench.step_variants import (
    NAMES,
    SIZES,
    Variant,
    count_flops,
    count_saved_bytes,
    fake_variant,
    make_variant,
    without_dropout,
)

# In the order in which they are reached. The loss includes the upsampling of logits, and both include their backward.
PARTS = (
    "pseudo pass",
    "encoder forward",
    "bottleneck forward",
    "head forward",
    "loss",
    "head backward",
    "bottleneck backward",
    "encoder backward",
    "update",
)
_COLUMNS = {
    "variant": ("variant", 1.0),
    "s p20": ("seconds_p20", 1.0),
    "p50": ("seconds_p50", 1.0),
    "p80": ("seconds_p80", 1.0),
    "ratio": ("ratio", 1.0),
    "images/s": ("images_per_s", 1.0),
    "GFLOP": ("flops", 1e-9),
    "GFLOP/s": ("flops_per_s", 1e-9),
    "% of GEMM": ("gemm_fraction", 100.0),
    "saved MB": ("saved_bytes", 1e-6),
    "peak MB": ("peak_bytes", 1e-6),
}
_PART_COLUMNS = {"variant": ("variant", 1.0), **{f"{part} ms": (f"{part}_seconds", 1e3) for part in PARTS}}
_COUNT_COLUMNS = {
    "variant": ("variant", 1.0),
    "GFLOP": ("flops", 1e-9),
    "FLOP ratio": ("flops_ratio", 1.0),
    "saved MB": ("saved_bytes", 1e-6),
    "saved ratio": ("saved_ratio", 1.0),
}
_ON_GPU = (
    "naive",
    "naive bfloat16",
    "naive bfloat16 compiled",
    "ours bfloat16",
    "ours bfloat16 compiled",
    "ours bfloat16 graph",
    "ours bfloat16 compiled graph",
)
_WARMUP_STEPS = 5
_TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}


class PartTimer:
    """Times the parts of a training step from hooks on modules, on gradients of their outputs and on the optimizer.

    Args:
        variant: naive or ours; their modules have the same names.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._marks: list[tuple[str, Moment]] = []
        backbone, decoder = variant.model.backbone, variant.model.decoder
        assert decoder.allspark is not None
        backbone.register_forward_pre_hook(lambda *_: self._mark("pseudo pass"))
        backbone.register_forward_hook(self._after("encoder forward", "bottleneck backward"))
        decoder.allspark.register_forward_hook(self._after("bottleneck forward", "head backward"))
        decoder.decoder.register_forward_hook(self._after("head forward", "loss"))
        variant.optimizer.register_step_pre_hook(lambda *_: self._mark("encoder backward"))

    def time_step(self) -> dict[str, float]:
        """Take a step; returns the seconds of each part."""
        self._marks = [("start", stamp())]
        self.variant.step()
        self._mark("update")
        return {part: seconds_between(before, after) for (_, before), (part, after) in itertools.pairwise(self._marks)}

    def _after(self, forward: str, backward: str) -> Callable[[nn.Module, object, Tensor | list[Tensor]], None]:
        """Mark the end of a module's forward pass, and the moment at which the gradient of its output is there."""

        def hook(_: nn.Module, __: object, output: Tensor | list[Tensor]) -> None:
            self._mark(forward)
            deepest = output[-1] if isinstance(output, list) else output
            if deepest.requires_grad:
                deepest.register_hook(lambda _: self._mark(backward))

        return hook

    def _mark(self, part: str) -> None:
        if self.variant.model.training:  # the pseudo-label pass is one part
            self._marks.append((part, stamp()))


def time_whole(variant: Variant) -> dict[str, float]:
    """Take a step; returns its seconds as one part. Hooks would cut a compiled graph into pieces."""
    start = stamp()
    variant.step()
    return {"whole": seconds_between(start, stamp())}


def measure(size: str, repeats: int) -> Iterator[tuple[list[Record], str]]:
    """Check that the variants agree, then time their steps in turn.

    Args:
        size: a name in ``SIZES``.
        repeats: rounds; the medians are over these.

    Yields:
        a record for each variant, and two tables of them: whole steps, and their parts.

    Raises:
        AssertionError: a variant computes another loss.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = _ON_GPU if device == "cuda" else ("naive", "ours")
    model, batch = SIZES[size].build_model().to(device), SIZES[size].random_batch().to(device)
    # Compiling takes minutes and changes no mathematics.
    plain = {name: make_variant(name, without_dropout(copy.deepcopy(model)), batch) for name in names if name in NAMES}
    check_parity(plain, _TOLERANCE[device])
    variants = {name: make_variant(name, copy.deepcopy(model), batch) for name in names}
    parts = _time_in_turn(variants, repeats)
    baseline = _median_seconds(parts["naive"])
    records = [_record(size, name, variants[name], parts[name], baseline) for name in names]
    yield records, f"{table(records, _COLUMNS)}\n\n{table(records, _PART_COLUMNS)}"


def measure_counts(size: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """Count FLOPs and saved bytes of the variants, in single precision and under autocast; yields as ``measure``."""
    saved = {}
    for name in NAMES:
        with fake_variant(size, name, "cuda") as variant:  # autocast saves more on a GPU than on a CPU
            saved[name] = count_saved_bytes(variant)
    flops = {name: count_flops(size, name.partition(" ")[0]) for name in NAMES}
    records: list[Record] = [
        {
            "op": "train_step_cost",
            "size": f"{size}: {SIZES[size]}",
            "variant": name,
            "flops": flops[name],
            "flops_ratio": flops[name] / flops["naive"],
            "saved_bytes": saved[name],
            "saved_ratio": saved[name] / saved["naive"],
        }
        for name in NAMES
    ]
    yield records, table(records, _COUNT_COLUMNS)


def check_parity(variants: Mapping[str, Variant], tolerance: float) -> None:
    """Compare the losses with those of the first variant, relative to these.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    with torch.no_grad():
        losses = {name: variant.losses().total.item() for name, variant in variants.items()}
    baseline, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        assert abs(loss / expected - 1) <= tolerance, f"{name} has the loss {loss}, {baseline} has {expected}"


def _time_in_turn(variants: Mapping[str, Variant], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Return seconds of the parts of each step, after steps to warm up, compile and record."""
    timers = {
        name: PartTimer(variant).time_step if name in NAMES else functools.partial(time_whole, variant)
        for name, variant in variants.items()
    }
    for time_step in timers.values():
        for _ in range(_WARMUP_STEPS if torch.cuda.is_available() else 1):
            time_step()
    rounds = [{name: time_step() for name, time_step in timers.items()} for _ in range(repeats)]
    return {name: [steps[name] for steps in rounds] for name in timers}


def _median_seconds(steps: list[dict[str, float]]) -> float:
    return statistics.median(sum(step.values()) for step in steps)


def _record(size: str, name: str, variant: Variant, steps: list[dict[str, float]], baseline: float) -> Record:
    seconds = [sum(step.values()) for step in steps]
    median, flops = _median_seconds(steps), count_flops(size, name.partition(" ")[0])
    gemm = device_rates(torch.bfloat16 if "bfloat16" in name else torch.float32).flops
    return {
        "op": "train_step",
        "size": f"{size}: {SIZES[size]}",
        "variant": name,
        **{f"seconds_p{percent}": percentile(seconds, percent) for percent in (20, 50, 80)},
        "ratio": median / baseline,
        "images_per_s": 2 * SIZES[size].batch / median,
        "flops": flops,
        "flops_per_s": flops / median,
        "gemm_fraction": flops / median / gemm,
        "saved_bytes": count_saved_bytes(variant),
        # A graph's memory is taken once, when it is recorded.
        "peak_bytes": None if name.endswith(" graph") else peak_bytes(variant.step),
        **{
            f"{part}_seconds": statistics.median(step[part] for step in steps) if part in steps[0] else None
            for part in PARTS
        },
    }
