"""The training step, the official way against ours: whole, by parts, its memory."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bench.harness import Record, now, peak_bytes, percentile, table
from bench.step_cost import count_flops, count_saved_bytes, fake_variant
from bench.step_variants import SIZES, Variant, make_variant, without_dropout

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
    "saved MB": ("saved_bytes", 1e-6),
    "peak MB": ("peak_bytes", 1e-6),
}
_PART_COLUMNS = {"variant": ("variant", 1.0), **{f"{part} ms": (f"{part}_seconds", 1e3) for part in PARTS}}
_TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}


class PartTimer:
    """Times the parts of a training step from hooks on modules, on gradients of their outputs and on the optimizer.

    Args:
        variant: official or ours; their modules have the same names.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        backbone, decoder = variant.model.backbone, variant.model.decoder
        assert decoder.allspark is not None
        backbone.register_forward_pre_hook(lambda *_: self._mark("pseudo pass"))
        backbone.register_forward_hook(self._after("encoder forward", "bottleneck backward"))
        decoder.allspark.register_forward_hook(self._after("bottleneck forward", "head backward"))
        decoder.decoder.register_forward_hook(self._after("head forward", "loss"))
        variant.optimizer.register_step_pre_hook(lambda *_: self._mark("encoder backward"))

    def time_step(self) -> dict[str, float]:
        """Run a step; returns the seconds of each part."""
        self._marks = [("start", _stamp())]
        self.variant.step()
        self._mark("update")
        now()
        return {part: _seconds(before, after) for (_, before), (part, after) in itertools.pairwise(self._marks)}

    def _after(self, forward: str, backward: str) -> Callable[[nn.Module, object, Tensor | list[Tensor]], None]:
        """Marks the end of a module's forward pass, and the moment at which the gradient of its output is there."""

        def hook(_: nn.Module, __: object, output: Tensor | list[Tensor]) -> None:
            self._mark(forward)
            deepest = output[-1] if isinstance(output, list) else output
            if deepest.requires_grad:
                deepest.register_hook(lambda _: self._mark(backward))

        return hook

    def _mark(self, part: str) -> None:
        if self.variant.model.training:  # the pseudo-label pass is one part
            self._marks.append((part, _stamp()))


def _stamp() -> float | torch.cuda.Event:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after) / 1e3


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
    names = ["naive", "naive bfloat16", "ours bfloat16"] if device == "cuda" else ["naive", "ours"]
    model, batch = SIZES[size].build_model().to(device), SIZES[size].random_batch().to(device)
    plain = {name: make_variant(name, without_dropout(copy.deepcopy(model)), batch) for name in names}
    _check_parity(plain, _TOLERANCE[device])
    timers = {name: PartTimer(make_variant(name, copy.deepcopy(model), batch)) for name in names}
    parts = _time_in_turn(timers, repeats)
    baseline = _median_seconds(parts["naive"])
    records = [_record(size, name, timers[name].variant, parts[name], baseline) for name in names]
    yield records, f"{table(records, _COLUMNS)}\n\n{table(records, _PART_COLUMNS)}"


def _check_parity(variants: Mapping[str, Variant], tolerance: float) -> None:
    with torch.no_grad():
        losses = {name: variant.losses().total.item() for name, variant in variants.items()}
    baseline, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        assert abs(loss / expected - 1) <= tolerance, f"{name} has the loss {loss}, {baseline} has {expected}"


def _time_in_turn(timers: Mapping[str, PartTimer], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of the parts of each step, after a step to warm up."""
    for timer in timers.values():
        timer.time_step()
    rounds = [{name: timer.time_step() for name, timer in timers.items()} for _ in range(repeats)]
    return {name: [steps[name] for steps in rounds] for name in timers}


def _median_seconds(steps: list[dict[str, float]]) -> float:
    return statistics.median(sum(step.values()) for step in steps)


def _record(size: str, name: str, variant: Variant, steps: list[dict[str, float]], baseline: float) -> Record:
    seconds = [sum(step.values()) for step in steps]
    median = _median_seconds(steps)
    with fake_variant(size, name) as fake:
        flops = count_flops(fake)
    record: Record = {"op": "train_step", "size": f"{size}: {SIZES[size]}", "variant": name}
    record |= {f"seconds_p{percent}": percentile(seconds, percent) for percent in (20, 50, 80)}
    record |= {
        "ratio": median / baseline,
        "images_per_s": 2 * SIZES[size].batch / median,
        "flops": flops,
        "flops_per_s": flops / median,
        "saved_bytes": count_saved_bytes(variant),
        "peak_bytes": peak_bytes(variant.step),
    }
    return record | {f"{part}_seconds": statistics.median(step[part] for step in steps) for part in PARTS}
