"""The benchmarks run, check parity and write what their tables show."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.training.step import Losses, compute_losses
from bench import bench_train_step
from bench.__main__ import main
from bench.bench_train_step import SIZES, fake_variant, make_variant, without_dropout
from bench.harness import FLOP_FORMULAS, Case, cell, conditions, flop_counter, gemm_rate, report, run, saved_bytes
from bench.operators import attention_cases, memory_cases, upsample_cases


def test_every_benchmark_runs(tmp_path, capsys):
    """All of those that need no compiler."""
    file = tmp_path / "out.json"
    main(["all", "--size", "tiny", "--repeats", "2", "--json", str(file)])
    records, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert {record["op"] for record in records} == {
        "channel_attention",
        "channel_semantic_grouping",
        "semantic_memory_enqueue",
        "upsample_cross_entropy",
        "upsample_argmax",
        "mix_ffn",
        "train_step",
        "train_step_cost",
        "launches",
    }
    for record in records:
        assert record["conditions"] == conditions()
        for key, factor in (("seconds_p50", 1e3), ("saved_bytes", 1e-6)):
            if record.get(key):
                assert record[key] > 0
                assert cell(record[key], factor) in printed
        if record.get("gemm_fraction"):
            assert record["gemm_fraction"] * gemm_rate(torch.float32) == pytest.approx(record["flops_per_s"])


def test_the_flops_of_a_variant_are_those_of_the_first():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    variants = {"product": lambda: a @ b, "by hand": lambda: (a[:, :, None] * b).sum(1)}
    for record in run(Case(op="op", size="size", variants=variants, inputs=(a,)), repeats=1):
        assert record["flops"] == 2 * (2 * 3 * 4 * 5)  # the product, and the gradient of a


@pytest.mark.slow
def test_a_compiled_step_is_the_same():
    """Ours; to trace the naive one takes more than a minute."""
    model, batch = without_dropout(SIZES["tiny"].build_model()), SIZES["tiny"].random_batch()
    eager, compiled = (
        make_variant(name, copy.deepcopy(model), batch, backend="eager") for name in ("ours", "ours compiled")
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled.loss(), eager.loss())


@pytest.mark.parametrize("name", ["naive", "ours"])
def test_saved_bytes_of_a_step_are_counted_without_running_it(name):
    size = SIZES["tiny"]
    variant = make_variant(name, size.build_model(), size.random_batch())
    real = saved_bytes(variant.loss, beyond=variant.own)
    with fake_variant("tiny", name) as fake:
        assert saved_bytes(fake.loss, beyond=fake.own) == real


@pytest.mark.parametrize("name", ["channel_attention", "convolution"])
def test_flops_by_hand(name):
    x, y = torch.randn(2, 1, 9, 4, requires_grad=True), torch.randn(1, 1, 9, 12, requires_grad=True)
    images, weight = torch.randn(2, 8, 5, 7, requires_grad=True), torch.randn(8, 2, 3, 3, requires_grad=True)
    with flop_counter() as counter:
        channel_attention(x, y, y).sum().backward()
        F.conv2d(images, weight, padding=1, groups=4).sum().backward()
    forward, factor = {  # attention computes the similarity once more
        "channel_attention": (2 * 2 * (2 * 9 * 4) * 12, 2.5),
        "convolution": (2 * (2 * 8 * 5 * 7) * (2 * 3 * 3), 2),
    }[name]
    counts = {str(operator).split(".")[1]: count for operator, count in counter.get_flop_counts()["Global"].items()}
    assert (counts[name], counts[f"{name}_backward"]) == (forward, factor * forward)


def test_every_operator_that_multiplies_has_a_formula():
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("allspark_fast::")]
    counted = {str(operator).replace(".", "::") for operator in FLOP_FORMULAS}
    other = {name for name in operators if name not in counted}
    # The last are those of other tests; FLOPs of the depthwise convolution are counted as torch's operation.
    without = ("upsample_", "semantic_memory_enqueue", "depthwise_gelu", "test_only_")
    assert all(name.split("::")[1].startswith(without) for name in other), other


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: x * y + 1, "output of b differs from a"),
        (lambda x, y: x * y.detach() + 0 * y, "gradient 1 of b differs from a"),
    ],
)
def test_a_wrong_variant_gets_no_number(wrong, message):
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    with pytest.raises(AssertionError, match=message):
        run(Case(op="op", size="size", variants={"a": lambda: x * y, "b": lambda: wrong(x, y)}, inputs=(x, y)))


def test_a_wrong_step_gets_no_number(monkeypatch):
    def biased(*arguments, **options):
        return Losses._make(1.01 * loss for loss in compute_losses(*arguments, **options))

    monkeypatch.setattr(bench_train_step, "compute_losses", biased)
    with pytest.raises(AssertionError, match="output of ours differs from naive"):
        list(bench_train_step.measure("tiny", repeats=1))


def test_what_a_comparator_raises_is_its_note(capsys):
    def refuse():
        raise NotImplementedError("head dim 289\nand a trace")

    x = torch.randn(3)
    variants = {"a": lambda: x, "b": refuse}
    first, second = run(Case(op="op", size="size", variants=variants, comparators=["b"]), repeats=1)
    assert first["seconds_p50"] > 0
    assert second["seconds_p50"] is None
    report([first, second])
    assert "| n/a | NotImplementedError: head dim 289 |" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):
        run(Case(op="op", size="size", variants=variants))


def test_saved_bytes_counts_storages_once():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: (x * x) * x.view(10, 10).flatten()) == 800  # x, and its square


@pytest.mark.parametrize("cases", [attention_cases, upsample_cases, memory_cases])
def test_speed(benchmark, cases):
    """The forward pass of our operator; at Pascal's size with ``--benchmark-enable --benchmark-autosave``."""
    case = cases("tiny" if benchmark.disabled else "pascal")[0]
    ours = next(name for name in ("ours", "triton", "chunked") if name in case.variants)
    assert benchmark(case.variants[ours]).shape == case.variants["naive"]().shape


@pytest.mark.slow
def test_attention_on_cpu_is_within_its_time_budget():
    """At most 1.2 times the naive attention, forward and backward, and a quarter of its peak memory."""
    (case,) = attention_cases("pascal")
    case = case._replace(variants={name: case.variants[name] for name in ("naive", "chunked")})
    records = {record["variant"]: record for record in run(case, repeats=3)}
    assert records["chunked"]["ratio"] <= 1.2
    assert records["chunked"]["saved_bytes"] <= records["naive"]["saved_bytes"] / 8
    assert records["chunked"]["peak_bytes"] <= records["naive"]["peak_bytes"] / 4


@pytest.mark.slow
def test_the_step_keeps_a_quarter_of_the_bytes():
    """At most a quarter of what the reference implementation saves for backward, at the size of README's table."""
    saved = {}
    for name in ("naive", "ours"):
        with fake_variant("pascal_b0", name) as fake:
            saved[name] = saved_bytes(fake.loss, beyond=fake.own)
    assert saved["ours"] <= saved["naive"] / 4
