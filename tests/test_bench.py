"""The benchmarks run, check parity and write what their tables show."""

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.bench_channel_attention import cases
from bench.harness import Case, run, saved_bytes


def test_every_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["all", "--size", "tiny", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {record["op"] for record in records} == {
        "channel_attention",
        "channel_semantic_grouping",
        "semantic_memory_enqueue",
        "upsample_cross_entropy",
        "upsample_argmax",
    }
    printed = capsys.readouterr().out
    for record in records:
        assert record["both_p50_ms"] > 0
        assert f"{record['both_p50_ms']:.2f}" in printed


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
