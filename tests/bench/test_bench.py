"""The benchmarks run, check parity and write what their tables show."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from allspark_fast.kernels.channel_attention import channel_attention
from bench import bench_channel_attention, bench_semantic_memory, bench_train_step, bench_upsample
from bench.__main__ import main
from bench.bench_channel_attention import cases
from bench.bench_train_step import FLOP_FORMULAS, SIZES, count_saved_bytes, fake_variant, make_variant, without_dropout
from bench.harness import Case, cell, conditions, device_rates, run, saved_bytes, table
from bench.naive import naive_channel_attention


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Records and printed tables of every benchmark that needs no compiler."""
    file, printed = tmp_path_factory.mktemp("bench") / "out.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["all", "--size", "tiny", "--repeats", "2", "--json", str(file)])
    return json.loads(file.read_text()), printed.getvalue()


def test_every_benchmark_runs(tiny_run: tuple[list[dict[str, Any]], str]) -> None:
    records, printed = tiny_run
    assert {record["op"] for record in records} == {
        "channel_attention",
        "channel_semantic_grouping",
        "semantic_memory_enqueue",
        "upsample_cross_entropy",
        "upsample_argmax",
        "mix_ffn",
        "train_step",
        "train_step_cost",
    }
    for record in records:
        assert record["conditions"] == conditions()
        for key in {"both_p50_ms", "seconds_p50", "saved_ratio"} & record.keys():
            if record.get("reason"):
                assert record[key] is None
                assert f"{record['variant']}: n/a, {record['reason']}" in printed
                continue
            assert record[key] > 0
            assert cell(record[key], 1.0) in printed
        if record.get("gemm_fraction"):
            assert record["gemm_fraction"] * device_rates(torch.float32).flops == pytest.approx(record["flops_per_s"])


@pytest.mark.slow
def test_a_compiled_step_is_the_same() -> None:
    """Ours; to trace the naive one takes more than a minute."""
    model, batch = without_dropout(SIZES["tiny"].build_model()), SIZES["tiny"].random_batch()
    eager, compiled = (
        make_variant(name, copy.deepcopy(model), batch, backend="eager") for name in ("ours", "ours compiled")
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled.losses().total, eager.losses().total)


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
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as ours:
        channel_attention(query, key, key).sum().backward()
    counts = ours.get_flop_counts()["Global"]
    forward = naive.get_total_flops()
    assert counts[torch.ops.allspark_fast.channel_attention] == forward
    assert counts[torch.ops.allspark_fast.channel_attention_backward] == 5 * forward / 2  # the similarity once more


def test_flops_of_grouped_convolutions_by_hand() -> None:
    images, weight = torch.randn(2, 8, 5, 7, requires_grad=True), torch.randn(8, 2, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        F.conv2d(images, weight, padding=1, groups=4).sum().backward()
    forward = 2 * (2 * 8 * 5 * 7) * (2 * 3 * 3)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.convolution] == forward
    assert counts[torch.ops.aten.convolution_backward] == 2 * forward


def test_every_operator_that_multiplies_has_a_formula() -> None:
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("allspark_fast::")]
    counted = {str(operator).replace(".", "::") for operator in FLOP_FORMULAS}
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


def test_a_wrong_step_gets_no_number() -> None:
    model, batch = without_dropout(SIZES["tiny"].build_model()), SIZES["tiny"].random_batch()
    variants = {name: make_variant(name, copy.deepcopy(model), batch) for name in ("naive", "ours")}
    bench_train_step.check_parity(variants, 1e-4)
    with torch.no_grad():
        variants["ours"].model.decoder.decoder.linear_pred.bias[0] += 1
    with pytest.raises(AssertionError, match=r"ours has the loss [\d.]+, naive has"):
        bench_train_step.check_parity(variants, 1e-4)


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
    """At most a quarter of what the reference implementation saves for backward, at the size of README's table."""
    saved = {}
    for name in ("naive", "ours"):
        with fake_variant("pascal_b0", name) as fake:
            saved[name] = count_saved_bytes(fake)
    assert saved["ours"] <= saved["naive"] / 4
