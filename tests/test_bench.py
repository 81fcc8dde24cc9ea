"""The benchmarks run, check parity and write what their tables show."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from allspark_fast.kernels.channel_attention import channel_attention
from bench import (
    bench_channel_attention,
    bench_data,
    bench_semantic_memory,
    bench_train_step,
    bench_upsample,
    footprint,
    rank_cost,
    step_variants,
)
from bench.__main__ import main
from bench.bench_channel_attention import cases
from bench.harness import Case, cell, conditions, run, saved_bytes, table
from bench.naive import naive_channel_attention
from bench.step_cost import FORMULAS, count_saved_bytes, fake_variant
from bench.step_variants import SIZES, StepSize, make_variant, without_dropout


def test_every_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["all", "--size", "tiny", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {record["op"] for record in records} == {
        "channel_attention",
        "channel_semantic_grouping",
        "semantic_memory_enqueue",
        "upsample_cross_entropy",
        "upsample_argmax",
        "mix_ffn",
        "train_step",
        "train_step_cost",
        "rank_cost",
    }
    printed = capsys.readouterr().out
    for record in records:
        for key in {"both_p50_ms", "seconds_p50", "saved_ratio"} & record.keys():
            if record.get("reason"):
                assert record[key] is None
                assert f"{record['variant']}: n/a, {record['reason']}" in printed
                continue
            assert record[key] > 0
            assert cell(record[key], 1.0) in printed


def test_the_step_is_reported_whole_and_by_parts() -> None:
    ((records, _),) = bench_train_step.measure("tiny", 1)
    assert [record["variant"] for record in records] == ["naive", "ours"]
    for record in records:
        assert {"seconds_p50", "saved_bytes", "peak_bytes", "flops"} <= record.keys()
        parts = [record[f"{part}_seconds"] for part in bench_train_step.PARTS]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(record["seconds_p50"])


@pytest.mark.slow
def test_a_compiled_step_is_the_same_and_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours; to trace the naive one takes more than a minute."""
    monkeypatch.setattr(step_variants, "BACKEND", "eager")
    model, batch = without_dropout(SIZES["tiny"].build_model()), SIZES["tiny"].random_batch()
    eager, compiled = (make_variant(name, copy.deepcopy(model), batch) for name in ("ours", "ours compiled"))
    with torch.no_grad():
        torch.testing.assert_close(compiled.losses().total, eager.losses().total)
    assert bench_train_step.time_whole(compiled)["whole"] > 0


@pytest.mark.parametrize("name", ["naive", "ours"])
def test_saved_bytes_of_a_step_are_counted_without_running_it(name: str) -> None:
    size = SIZES["tiny"]
    real = count_saved_bytes(make_variant(name, size.build_model(), size.random_batch()))
    with fake_variant("tiny", name) as fake:
        assert count_saved_bytes(fake) == real


def test_data_path(data_dir: Path) -> None:
    ((records, _),) = bench_data.measure("voc", 1)
    labeled, unlabeled, both = records
    assert labeled["transform_seconds"] > unlabeled["transform_seconds"] > 0
    assert labeled["images_per_s"] < both["images_per_s"] < unlabeled["images_per_s"]


def test_flops_of_our_attention_are_those_of_the_plain_one() -> None:
    query, key = torch.randn(2, 1, 9, 4, requires_grad=True), torch.randn(1, 1, 9, 12, requires_grad=True)
    with FlopCounterMode(display=False) as naive:
        naive_channel_attention(query, key, key)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as ours:
        channel_attention(query, key, key).sum().backward()
    counts = ours.get_flop_counts()["Global"]
    forward = naive.get_total_flops()
    assert counts[torch.ops.allspark_fast.channel_attention] == forward
    assert counts[torch.ops.allspark_fast.channel_attention_backward] == 5 * forward / 2  # the similarity once more


def test_every_operator_that_multiplies_has_a_formula() -> None:
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("allspark_fast::")]
    counted = {str(operator).replace(".", "::") for operator in FORMULAS}
    other = {name for name in operators if name not in counted}
    without = ("upsample_", "semantic_memory_enqueue", "test_only_")  # the last are those of other tests
    assert all(name.split("::")[1].startswith(without) for name in other), other


def test_a_wrong_variant_gets_no_number() -> None:
    x = torch.randn(3)
    with pytest.raises(AssertionError, match="output of b differs from a"):
        run(Case(op="op", size="size", variants={"a": lambda: x, "b": lambda: x + 1}))


def test_a_wrong_gradient_gets_no_number() -> None:
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    variants = {"a": lambda: x * y, "b": lambda: x * y.detach() + 0 * y}
    with pytest.raises(AssertionError, match="gradient 1 of b differs from a"):
        run(Case(op="op", size="size", variants=variants, inputs=(x, y)))


def test_conditions_name_the_versions() -> None:
    for name in ("torch", "triton", "xformers"):
        if find_spec(name):
            assert f"{name} {version(name)}" in conditions()


def test_what_a_comparator_raises_is_its_reason() -> None:
    def refuse() -> torch.Tensor:
        raise NotImplementedError("head dim 289\nand a trace")

    x = torch.randn(3)
    variants = {"a": lambda: x, "b": refuse}
    first, second = run(Case(op="op", size="size", variants=variants, comparators=["b"]), repeats=1)
    assert first["both_p50_ms"] > 0
    assert (second["variant"], second["reason"]) == ("b", "NotImplementedError: head dim 289")
    assert second["both_p50_ms"] is None
    assert "| b | n/a |" in table([first, second], {"variant": ("variant", 1.0), "ms": ("both_p50_ms", 1.0)})
    with pytest.raises(NotImplementedError):
        run(Case(op="op", size="size", variants=variants))


def test_library_attention_computes_the_same() -> None:
    query, key, value = torch.randn(2, 1, 9, 16), torch.randn(1, 1, 9, 48), torch.randn(1, 1, 9, 48)
    attend = functools.partial(flex_attention, scale=1.0)  # compiling it takes a minute on a CPU
    actual = bench_channel_attention.library_attention(attend, query, key, value)
    torch.testing.assert_close(actual, naive_channel_attention(query, key, value))


def test_rates_bound_what_was_measured() -> None:
    (case,) = cases("tiny")
    for record in run(case, repeats=1):
        if record["reason"] is None:
            assert 0 < record["gemm_fraction"] <= 2  # of a product, on a machine that others use
            assert record["roofline_fraction"] >= record["gemm_fraction"] * 0.999


def test_saved_bytes_counts_storages_once() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: (x * x) * x.view(10, 10).flatten()) == 800  # x, and its square


@pytest.mark.parametrize("variant", ["naive", "ours"])
@pytest.mark.parametrize(
    ("cases", "index"),
    [
        (bench_channel_attention.cases, 0),
        (bench_semantic_memory.cases, 0),
        (bench_semantic_memory.cases, 1),
        (bench_upsample.cases, 0),
        (bench_upsample.cases, 1),
    ],
    ids=["attention", "grouping", "enqueue", "loss", "argmax"],
)
def test_speed(benchmark: Any, cases: Callable[[str], list[Case]], index: int, variant: str) -> None:
    """The forward pass; at Pascal's size with ``pytest --benchmark-enable``."""
    case = cases("tiny" if benchmark.disabled else "pascal")[index]
    ours = next(x for x in ("triton", "chunked", "vectorized") if x in case.variants and x not in case.unavailable)
    benchmark.group = case.op
    benchmark.extra_info["size"] = case.size
    output = benchmark(case.variants["naive" if variant == "naive" else ours])
    assert output.shape == case.variants["naive"]().shape


@pytest.mark.slow
def test_attention_on_cpu_is_within_its_time_budget() -> None:
    """At most 1.2 times the naive attention, forward and backward, and a quarter of its peak memory."""
    (case, *_) = cases("pascal")
    case = dataclasses.replace(case, variants={name: case.variants[name] for name in ("naive", "chunked")})
    records = {record["variant"]: record for record in run(case, repeats=3)}
    assert records["chunked"]["ratio"] <= 1.2
    assert records["chunked"]["saved_mb"] <= records["naive"]["saved_mb"] / 8
    assert records["chunked"]["peak_mb"] <= records["naive"]["peak_mb"] / 4


@pytest.mark.slow
def test_the_step_keeps_a_quarter_of_the_bytes() -> None:
    """At most a quarter of what the official step keeps for backward, at the size of the table in the README."""
    saved = {}
    for name in ("naive", "ours"):
        with fake_variant("pascal_b0", name) as fake:
            saved[name] = count_saved_bytes(fake)
    assert saved["ours"] <= saved["naive"] / 4


def test_docs_have_the_costs_of_a_rank() -> None:
    """And those that can be worked out by hand: MiT-B5 at crop 513 has 17 x 17 tokens and 512 channels, K = 21."""
    ((records, _),) = rank_cost.measure("pascal", 1)
    docs = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
    for record in records:
        sharding = "" if record["ranks"] == 1 else record["sharding"]
        cells = [record[f"{name}_bytes"] for name in ("state", "gathered", "sent", "memory_rank0", "memory_all")]
        row = " | ".join(f"{cell / 1e6:.0f}" if cell else "" for cell in cells)
        assert " ".join(f"| {record['ranks']} | {sharding} | {row} |".split()) in " ".join(docs.split()), row
    of_ranks = {(record["ranks"], record["sharding"]): record for record in records}
    assert of_ranks[4, "replicate"]["memory_rank0_bytes"] == 4 * 21 * 512 * 17 * 17
    assert of_ranks[4, "fsdp"]["memory_all_bytes"] == 3 * 2 * 512 * (4 * 17 * 17 + 8)
    assert of_ranks[4, "replicate"]["sent_bytes"] == 1.5 * of_ranks[4, "replicate"]["state_bytes"] / 3


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch built with CUDA, but no GPU")
def test_footprint_counts_what_checkpointing_saves() -> None:
    size = StepSize("mit_tiny", 2, 5, 65, embedding_dim=32)
    (state, saved), (same, checkpointed) = (footprint.count_bytes(size, checkpointing=x) for x in (False, True))
    parameters = sum(x.nbytes for x in size.build_model().parameters())
    assert state == same > 5 * parameters
    assert 0 < checkpointed < saved
