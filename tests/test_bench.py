"""The benchmarks run, check parity and write what their tables show."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allspark_fast.kernels.channel_attention import channel_attention
from bench import bench_train_step
from bench.__main__ import main
from bench.bench_channel_attention import cases
from bench.harness import Case, run, saved_bytes
from bench.naive import naive_channel_attention
from bench.step_cost import FORMULAS, count_saved_bytes, fake_variant
from bench.step_variants import SIZES, make_variant


def test_every_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["all", "--size", "tiny", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {record["op"] for record in records} == {
        "channel_attention",
        "channel_semantic_grouping",
        "semantic_memory_enqueue",
        "upsample_cross_entropy",
        "upsample_argmax",
        "train_step",
        "train_step_cost",
    }
    printed = capsys.readouterr().out
    for record in records:
        for key in {"both_p50_ms", "seconds_p50", "saved_ratio"} & record.keys():
            assert record[key] > 0
            assert f"{record[key]:.2f}" in printed


def test_the_step_is_reported_whole_and_by_parts() -> None:
    ((records, _),) = bench_train_step.measure("tiny", 1)
    assert [record["variant"] for record in records] == ["naive", "ours"]
    for record in records:
        assert {"seconds_p50", "saved_bytes", "peak_bytes", "flops"} <= record.keys()
        parts = [record[f"{part}_seconds"] for part in bench_train_step.PARTS]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(record["seconds_p50"])


@pytest.mark.parametrize("name", ["naive", "ours"])
def test_saved_bytes_of_a_step_are_counted_without_running_it(name: str) -> None:
    size = SIZES["tiny"]
    real = count_saved_bytes(make_variant(name, size.build_model(), size.random_batch()))
    with fake_variant("tiny", name) as fake:
        assert count_saved_bytes(fake) == real


def test_flops_of_our_attention_are_those_of_the_plain_one() -> None:
    query, key = torch.randn(2, 1, 9, 4, requires_grad=True), torch.randn(1, 1, 9, 12, requires_grad=True)
    with FlopCounterMode(display=False) as naive:
        naive_channel_attention(query, key, key)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as ours:
        channel_attention(query, key, key).sum().backward()
    counts = ours.get_flop_counts()["Global"]
    forward = naive.get_total_flops()
    assert counts[torch.ops.allspark_fast.softmax_attention] == forward
    assert counts[torch.ops.allspark_fast.softmax_attention_backward] == 5 * forward / 2  # the similarity once more


def test_every_operator_that_multiplies_has_a_formula() -> None:
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("allspark_fast::")]
    counted = {str(operator).replace(".", "::") for operator in FORMULAS}
    other = {name for name in operators if name not in counted}
    assert all(name.split("::")[1].startswith(("upsample_", "semantic_memory_enqueue")) for name in other), other


def test_a_wrong_variant_gets_no_number() -> None:
    x = torch.randn(3)
    with pytest.raises(AssertionError, match="b differs from a"):
        run(Case(op="op", size="size", variants={"a": lambda: x, "b": lambda: x + 1}))


def test_saved_bytes_counts_storages_once() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: (x * x) * x.view(10, 10).flatten()) == 800  # x, and its square


@pytest.mark.benchmark(group="channel_attention")
@pytest.mark.parametrize("name", ["naive", "chunked"])
def test_channel_attention_speed(benchmark: object, name: str) -> None:
    (case,) = cases("tiny")
    output = benchmark(case.variants[name])
    assert output.shape == case.variants["chunked"]().shape
    benchmark.extra_info["size"] = case.size


@pytest.mark.slow
def test_attention_on_cpu_is_within_its_time_budget() -> None:
    """At most 1.2 times the naive attention, forward and backward, and a quarter of its peak memory."""
    records = {record["variant"]: record for record in run(cases("pascal")[0], repeats=5)}
    assert records["chunked"]["ratio"] <= 1.2
    assert records["chunked"]["saved_mb"] <= records["naive"]["saved_mb"] / 8
    assert records["chunked"]["peak_mb"] <= records["naive"]["peak_mb"] / 4
