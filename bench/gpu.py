"""``python -m bench gpu``: what a GPU has to prove and to measure, in order of worth.

A part starts only if the time that it is expected to take is left. What it finds is reported at once, and what goes
wrong in it ends no other: the command can be stopped at any time. On a CPU the same code makes a dry run, in which
ordinary steps stand in for recorded ones.
"""

import copy
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import EvalSample
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.selftest import TOLERANCE, check_kernels
from allspark_fast.training import side_stream
from allspark_fast.training.cuda_graph import WARMUP_STEPS, largest_difference
from allspark_fast.training.step import Losses, TrainState, train_step
from bench import harness, operators
from bench.bench_train_step import SIZES, StepSize, make_variant, recorded_steps
from bench.harness import DEVICE, DTYPE, Case, Record

# Name, seconds that it takes on an H200, and what measures it.
Part = tuple[str, float, Callable[[], Iterator[Record]]]

# Settings of the optimization whose recorded steps are compared.
LOCK_STEPS: dict[str, dict[str, Any]] = {
    "allspark sgd": {},
    "allspark adamw float32": {"optimizer": "adamw", "amp": False},
    "semi sgd": {"method": "semi"},
    "supervised sgd": {"method": "supervised"},
    "two micro-batches adamw": {"optimizer": "adamw", "gradient_accumulation_steps": 2},
    "ohem": {"loss": "ohem", "ohem_min_kept": 500},
}
# Other constants of channel attention's Triton module, to be timed against those that it has.
ATTENTION_CONSTANTS: list[dict[str, int]] = [
    {},
    {"PIECE_COLUMNS": 2048},
    {"PIECE_COLUMNS": 8192},
    {"WORKSPACE_BYTES": 0},
    {"ROW_COLUMNS": 8192},
    {"TILE_ROWS": 4},
    {"TILE_ROWS": 16},
    {"WARPS": 4},
    {"TILE_ROWS": 4, "TILE_COLUMNS": 1024},
    {"TILE_ROWS": 4, "TILE_COLUMNS": 1024, "WARPS": 4},
]


def measure(size: str, budget: float) -> Iterator[Record]:
    """Run the parts that fit into ``budget`` seconds, and exit with the names of those that failed."""
    start, failed = time.monotonic(), []
    for name, seconds, part in parts(size):
        spent = time.monotonic() - start
        if spent + seconds > budget:
            yield {"op": name, "size": size, "note": f"not run: {spent:.0f} of {budget:.0f} s are spent"}
            continue
        print(f"[{spent:.0f} s] {name}", file=sys.stderr, flush=True)
        torch.compiler.reset()
        gc.collect()  # models in place of others
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield from part()
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            yield {"op": name, "size": size, "note": f"failed: {harness.error_line(error)}"}
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parts(size: str) -> list[Part]:
    """Return the parts, for a size of the training step, in order of worth."""
    small = StepSize("mit_b0", 2, 5, 128, embedding_dim=64) if DEVICE == "cuda" else SIZES[size]
    grid = operators.ATTENTION_GRID if DEVICE == "cuda" else [size]

    def step(seconds: float, variant: str) -> Part:
        make = partial(_step, size, variant)
        return f"step {variant}", seconds, partial(throughput, size, variant, 2 * SIZES[size].batch, make)

    attention = [(f"attention {name}", 60.0, partial(cases, operators.attention_cases, name)) for name in grid]
    return [
        ("parity", 60, parity),
        ("attention_parity", 20, partial(attention_parity, size)),
        *((f"lock_step {name}", 8, partial(lock_step, small, name)) for name in LOCK_STEPS),
        step(20, "ours bfloat16 recorded"),
        step(20, "ours bfloat16"),
        step(25, "naive bfloat16"),
        ("validation", 15, partial(throughput, size, "validation, ours bfloat16", 32, partial(_validation, size))),
        ("step_kernels", 15, partial(kernels, "step_kernels", size, partial(_step, size, "ours bfloat16 recorded"))),
        ("step one stream", 20, partial(one_stream, step(20, "ours bfloat16 recorded")[2])),
        step(100, "ours bfloat16 compiled recorded"),
        step(100, "naive bfloat16 compiled"),
        *attention[:2],
        ("attention_kernels", 10, partial(kernels, "attention_kernels", size, partial(_attention, size, {}))),
        ("attention_constants", 30, partial(cases, attention_constants, size)),
        ("ffn", 45, partial(cases, operators.ffn_cases, size)),
        ("memory", 15, partial(cases, operators.memory_cases, size)),
        ("loss and argmax", 25, partial(cases, operators.upsample_cases, size)),
        *attention[2:],
    ]


def cases(make: Callable[[str], list[Case]], size: str) -> Iterator[Record]:
    """Run the cases of an operator."""
    for case in make(size):
        yield from harness.run(case)


def parity() -> Iterator[Record]:
    """Compare every operator in every dtype with its reference in float64."""
    results = check_kernels(torch.device(DEVICE))
    for op, dtype, error, failure in results:
        yield {"op": "parity", "size": DEVICE, "variant": op, "dtype": dtype, "error": error, "note": failure}
    assert not any(result.failure for result in results)


def attention_parity(size: str) -> Iterator[Record]:
    """Compare channel attention at its full size, where the library splits sums, with its reference in float64."""
    mask, seed = torch.tensor([True, False], device=DEVICE), torch.tensor(7, device=DEVICE)
    attend = partial(channel_attention, group_mask=mask, dropout_p=0.1, seed=seed)
    for dtype, bound in TOLERANCE.items():
        inputs = operators.attention_inputs(size, dtype)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        actual = harness.outputs_and_grads(partial(attend, *inputs), inputs)
        expected = harness.outputs_and_grads(partial(attend, *exact, backend="reference"), exact)
        errors = [harness.relative_error(x, y) for x, y in zip(actual, expected, strict=True)]
        record: Record = {"op": "attention_parity", "size": size, "dtype": str(dtype), "bound": bound}
        yield record | dict(zip(("output", "dq", "dk", "dv"), errors, strict=True))
        assert all(error <= bound for error in errors), f"{dtype}: {errors}"


def lock_step(size: StepSize, name: str) -> Iterator[Record]:
    """Compare recorded steps with ordinary ones from the same state, batch and random seed.

    Differences cannot grow from step to step then, and that of two ordinary steps is the noise of the device. How large
    they may be is fixed in cuda_graph.py.
    """
    config = TrainConfig(ema=0.9, **LOCK_STEPS[name])
    model = size.build_model(config.method).to(DEVICE)
    states = [TrainState(copy.deepcopy(model), config, total_steps=100, ema=copy.deepcopy(model)) for _ in range(3)]
    recorded = recorded_steps(states[2])
    takes: list[Callable[..., Losses]] = [*(partial(train_step, state) for state in states[:2]), recorded]
    found = []
    # In each phase ordinary steps, the recording, and two replays, of which one is skipped for its image.
    steps = WARMUP_STEPS + 3
    for number, phase in enumerate([(False, False)] * steps + [(config.method == "allspark", True)] * steps):
        start, batch = copy.deepcopy(states[0].state_dict()), size.random_batch().to(DEVICE)
        results = [{"state": start, "losses": torch.zeros(3, device=DEVICE), "draws": torch.zeros(4, device=DEVICE)}]
        if number % steps == steps - 2:
            batch.image[0, 0, 0, 0] = float("nan")
        for state, take in zip(states, takes, strict=True):
            state.load_state_dict(start)
            torch.manual_seed(number)
            losses = torch.stack(take(batch, use_memory=phase[0], use_pseudo=phase[1]))
            results.append({"state": state.state_dict(), "losses": losses, "draws": torch.rand(4, device=DEVICE)})
        found.append({"step": number, **largest_difference(results)})
    worst = max(found, key=lambda x: x["error"] / max(x["allowed"], 1e-30))
    note = "" if DEVICE == "cuda" else "ordinary steps in place of recorded ones"
    yield {"op": "lock_step", "size": str(size), "variant": name, **worst, "note": note}
    assert recorded.recording, "the step could not be recorded"
    assert worst["error"] <= worst["allowed"], f"{worst['tensor']} differs in a recorded step"


def one_stream(part: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """Run a part whose recorded steps have no branches, which have to be worth their memory."""
    with patch.object(side_stream, "may_be_beside", lambda _: False):
        yield from ({**record, "variant": f"{record['variant']}, one stream"} for record in part())


def throughput(size: str, variant: str, images: int, make: Callable[[], Callable[[], object]]) -> Iterator[Record]:
    """Time what ``make`` returns; the peak is that of all tensors, model and optimizer among them."""
    function = make()
    first = harness.timed(function)[1]
    for _ in range(5):  # libraries choose their kernels, and steps are recorded
        function()
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < 40 and sum(seconds) < 3):
        seconds.append(harness.timed(function)[1])
    record: Record = {"op": "step", "size": f"{size}: {SIZES[size]}", "variant": variant}
    record |= {f"seconds_p{percent}": float(np.percentile(seconds, percent)) for percent in (20, 50, 80)}
    record |= {"images_per_s": images / record["seconds_p50"], "first_seconds": first}
    yield record | {"peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None}


def _step(size: str, name: str) -> Callable[[], object]:
    model, batch = SIZES[size].build_model().to(DEVICE), SIZES[size].random_batch().to(DEVICE)
    return make_variant(name, model, batch, backend="inductor" if DEVICE == "cuda" else "eager").step


def _validation(size: str) -> Callable[[], object]:
    """The evaluation of 32 whole images, without their loading."""
    model, height, width = SIZES[size].build_model().to(DEVICE), 3 * SIZES[size].crop // 4, SIZES[size].crop
    sample = EvalSample(torch.randn(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.uint8))
    return partial(evaluate, model, [sample] * 32, SIZES[size].classes, device=DEVICE, amp=True)


def kernels(op: str, size: str, make: Callable[[], Callable[[], object]], count: int = 3) -> Iterator[Record]:
    """Name what takes most of the time of what ``make`` returns: kernels, on a CPU torch's operations."""
    function = make()
    for _ in range(6):
        function()
    with profile(activities=[getattr(ProfilerActivity, DEVICE.upper())]) as profiler:
        for _ in range(count):
            harness.timed(function)
    time_of = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    events = [x for x in profiler.key_averages() if x.device_type.name == DEVICE.upper() and not x.is_user_annotation]
    found = sorted(((getattr(event, time_of), event.count, event.key) for event in events), reverse=True)
    everything = sum(kernel[0] for kernel in found), sum(kernel[1] for kernel in found), "all"
    for microseconds, launches, name in [everything, *found[:25]]:
        record: Record = {"op": op, "size": size, "seconds": microseconds / count / 1e6, "launches": launches / count}
        yield record | {"share": microseconds / everything[0], "kernel": name[:100].replace("|", "/")}


def attention_constants(size: str) -> list[Case]:
    """Return channel attention, forward and backward, with other constants of its Triton module."""
    variants = {str(constants or "as it is"): _attention(size, constants) for constants in ATTENTION_CONSTANTS}
    return [Case("attention_constants", size, variants)]


def _attention(size: str, constants: dict[str, int]) -> Callable[[], Tensor]:
    from allspark_fast.kernels.channel_attention import kernel  # noqa: PLC0415 triton is optional

    torch.manual_seed(0)
    inputs, seed = operators.attention_inputs(size, DTYPE), torch.zeros((), dtype=torch.int64, device=DEVICE)

    def attend_and_differentiate() -> Tensor:
        assert constants.keys() <= vars(kernel).keys(), constants
        with patch.dict(vars(kernel), constants):
            output = channel_attention(*inputs, dropout_p=0.1, seed=seed)
            return torch.autograd.grad(output, inputs, output.detach())[0]

    return attend_and_differentiate
