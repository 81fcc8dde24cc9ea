"""Channel attention: every backend against the materialised reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

from allspark_fast.kernels.channel_attention import channel_attention, chunked
from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from bench.harness import saved_bytes

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def inputs(
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    columns: int,
    *,
    shared: bool = True,
    dtype: torch.dtype = torch.float64,
    mean: float = 0.0,
) -> list[Tensor]:
    key_batch = 1 if shared else batch
    shapes = [(batch, heads, tokens, channels), *[(key_batch, heads, tokens, columns)] * 2]
    return [(torch.randn(shape, dtype=torch.float64) + mean).to(dtype).requires_grad_() for shape in shapes]


def output_and_grads(tensors: list[Tensor], **options: object) -> list[Tensor]:
    output = channel_attention(*tensors, **options)
    # Equal for all dtypes, as the inputs are.
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).bfloat16().to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, weight.view(output.shape))]


def assert_equal_to_reference(tensors: list[Tensor], tolerance: float, **options: object) -> None:
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = output_and_grads(doubles, **{**options, "backend": "reference"})
    for actual, target in zip(output_and_grads(tensors, **options), expected, strict=True):
        assert actual.isfinite().all()
        scale = target.abs().max().clamp(min=1e-2)  # gradients of a single column are zero
        assert (actual.double() - target).abs().max() <= tolerance * scale


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        ((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-5)).item()
        for x, y in zip(actual, expected, strict=True)
    ]


def assert_parity_with_grad(tensors: list[Tensor], grad: Tensor, **options: object) -> None:
    """Against float64: half precision to 1e-2, float32 to 1e-5 or what plain float32 comes to on such inputs."""

    def run(dtype: torch.dtype, **changed: object) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        output = channel_attention(*leaves, **{**options, **changed})
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    dtype = tensors[0].dtype
    expected = run(torch.float64, backend="reference")
    errors = relative_errors(run(dtype), expected)
    if dtype == torch.float32:
        plain = relative_errors(run(dtype, backend="reference"), expected)
        assert all(x <= max(1e-5, 2 * y) for x, y in zip(errors, plain, strict=True)), (errors, plain)
    else:
        assert max(errors) <= 1e-2, errors


def saturated_inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries that are noisy copies of key channels: each row attends to one key, and gradients are what it leaves."""
    key, value = (torch.randn(1, 1, tokens, 320) for _ in range(2))
    query = torch.stack([key[0][..., torch.randint(320, (24,))] for _ in range(2)])
    query += 0.3 * torch.randn_like(query)
    return [x.to(dtype) for x in (query, key, value)], torch.randn_like(query).to(dtype)


DEGENERATE = ("zero query", "zero row", "constant key", "tiny", "huge", "outlier", "small value")
GRADIENTS = ("large gradient", "no gradient")


def degenerate_inputs(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    query, key, value, grad = (torch.randn(x, 1, 32, y) for x, y in ((2, 24), (1, 96), (1, 96), (2, 24)))
    match kind:
        case "zero query":
            query *= 0
        case "zero row":
            query[..., 3] = 0
        case "constant key":
            key = key[..., :1].expand_as(key).clone()
        case "tiny":
            query, key = query * 1e-4, key * 1e-2
        case "huge":
            query, key = query * 1e3, key * 1e3
        case "outlier":
            key[..., 5] *= 100
        case "small value":
            value *= 1e-3
        case "large gradient":
            grad *= 3e4
        case "no gradient":
            grad *= 0
    return [x.to(dtype) for x in (query, key, value)], grad.to(dtype)


class TestAgainstTheDefinition:
    """The reference itself, against instance_norm and softmax of torch."""

    def test_reference_is_the_published_formula(self) -> None:
        query, key, value = inputs(2, 3, 7, 5, 11, shared=False)
        similarity = F.instance_norm(query.mT @ key, eps=1e-5)
        expected = (similarity.softmax(-1) @ value.mT).mT
        actual = channel_attention(query, key, value, backend="reference")
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    def test_eps_counts_for_small_inputs(self) -> None:
        query, key, value = (x.detach() * 1e-2 for x in inputs(1, 1, 4, 6, 8))
        similarity = F.instance_norm(query.mT @ key, eps=1e-3)
        expected = (similarity.softmax(-1) @ value.mT).mT
        for backend in ("reference", "chunked"):
            actual = channel_attention(query, key, value, eps=1e-3, backend=backend)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    def test_masked_groups_are_as_if_absent(self) -> None:
        query, key, value = inputs(2, 1, 7, 5, 12)
        mask = torch.tensor([True, False, True, False])
        kept = mask.repeat_interleave(3)
        expected = channel_attention(query, key[..., kept], value[..., kept], backend="reference")
        for backend in ("reference", "chunked"):
            actual = channel_attention(query, key, value, group_mask=mask, backend=backend)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_dropout_keeps_the_mean(self) -> None:
        query, key, _ = inputs(1, 1, 5, 64, 512)
        ones = torch.ones(1, 1, 5, 512, dtype=torch.float64)
        output = channel_attention(query, key, ones, dropout_p=0.25, seed=SEED)
        assert output.std() > 0
        assert output.mean().item() == pytest.approx(1, abs=0.02)


class TestBackends:
    """Every other backend against the reference."""

    @settings(max_examples=40, deadline=None)
    @given(
        batch=st.integers(0, 3),
        heads=st.integers(1, 3),
        tokens=st.integers(1, 20),
        channels=st.integers(1, 9),
        groups=st.integers(1, 4),
        group=st.integers(1, 9),
        shared=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.3]),
        masked=st.integers(0, 15),
    )
    def test_chunked_on_any_shape(
        self,
        batch: int,
        heads: int,
        tokens: int,
        channels: int,
        groups: int,
        group: int,
        shared: bool,
        dropout_p: float,
        masked: int,
    ) -> None:
        tensors = inputs(batch, heads, tokens, channels, groups * group, shared=shared)
        mask = torch.tensor([masked >> i & 1 == 0 for i in range(groups)])
        if batch == 0:
            output = channel_attention(*tensors, group_mask=mask, dropout_p=dropout_p, seed=SEED)
            assert output.shape == tensors[0].shape
            return
        assert_equal_to_reference(tensors, 1e-9, group_mask=mask, dropout_p=dropout_p, seed=SEED)

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_chunked_over_several_blocks_and_chunks(
        self, shared: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chunked, "BLOCK_ROWS", 3)
        monkeypatch.setattr(chunked, "BLOCK_ENTRIES", 0)
        monkeypatch.setattr(chunked, "CHUNK", 20)
        tensors = inputs(2, 2, 9, 5, 75, shared=shared, dtype=torch.float32)
        mask = torch.tensor([True, True, False, True, True])
        assert_equal_to_reference(tensors, 1e-5, group_mask=mask, dropout_p=dropout_p, seed=SEED)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("backend", ["chunked", "reference"])
    def test_half_precision(self, dtype: torch.dtype, backend: str) -> None:
        tensors = inputs(2, 1, 25, 16, 64, dtype=dtype)
        assert_equal_to_reference(tensors, 1e-2, backend=backend)

    @pytest.mark.parametrize("backend", ["chunked", "reference"])
    def test_all_groups_masked_gives_zeros_and_zero_gradients(self, backend: str) -> None:
        tensors = inputs(2, 1, 7, 5, 12, dtype=torch.float32)
        for x in output_and_grads(tensors, group_mask=torch.zeros(3, dtype=torch.bool), backend=backend):
            assert torch.equal(x, torch.zeros_like(x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_with_a_mean_as_large_as_the_deviation(self, dtype: torch.dtype) -> None:
        tensors = inputs(2, 1, 25, 16, 64, dtype=dtype, mean=1.0)
        assert_equal_to_reference(tensors, 1e-2)

    def test_a_variance_that_rounds_below_zero(self) -> None:
        """Large equal queries and keys at right angles to them: the variance of a map of zeros is a difference."""
        direction = F.normalize(torch.randn(20, 9, 1), dim=1)
        key = torch.randn(20, 9, 50)
        key -= direction @ (direction.mT @ key)
        query = (1000 * direction).expand(-1, -1, 5)
        assert channel_attention(query[:, None], key[:, None], key[:, None]).isfinite().all()

    @pytest.mark.parametrize("mean", [10.0, 100.0])
    def test_large_means(self, mean: float) -> None:
        """The norm takes means out before it multiplies: float32 survives means far above the deviations."""
        tensors = inputs(1, 1, 49, 32, 96, dtype=torch.float32, mean=mean)
        naive_error = 2e-7 * mean**2  # rounding of S, relative to its deviation, in any formula that forms it
        assert_equal_to_reference(tensors, max(1e-4, naive_error))

    def test_constant_inputs(self) -> None:
        tensors = [torch.ones_like(x).requires_grad_() for x in inputs(2, 1, 7, 5, 12, dtype=torch.float32)]
        output, *grads = output_and_grads(tensors)
        torch.testing.assert_close(output, torch.ones_like(output))
        assert all(x.isfinite().all() for x in grads)

    def test_one_huge_outlier(self) -> None:
        tensors = inputs(1, 1, 9, 6, 20, dtype=torch.float32)
        with torch.no_grad():
            tensors[1][0, 0, 4, 7] = 1e4
        assert_equal_to_reference(tensors, 1e-3)

    def test_strided_views(self) -> None:
        query, key, value = (x.detach() for x in inputs(2, 2, 9, 6, 10, shared=False))
        expected = channel_attention(query, key, value)
        views = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (query, key, value)]
        assert not views[0].is_contiguous()
        torch.testing.assert_close(channel_attention(*views), expected)

    def test_expanded_views(self) -> None:
        tensors = [x.detach() for x in inputs(1, 1, 9, 6, 10)]
        expected = channel_attention(*tensors).expand(3, 2, -1, -1)
        views = [x.expand(3, 2, -1, -1) for x in tensors]
        torch.testing.assert_close(channel_attention(*views), expected)

    def test_infinity_and_nan_show(self) -> None:
        for bad in (math.inf, math.nan):
            query, key, value = (x.detach() for x in inputs(1, 1, 5, 4, 6))
            key[0, 0, 2, 3] = bad
            assert not channel_attention(query, key, value).isfinite().all()

    def test_autocast_does_not_change_the_arithmetic(self) -> None:
        tensors = inputs(1, 1, 9, 6, 20, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = channel_attention(*tensors)
        grads = torch.autograd.grad(output.sum(), tensors)
        expected = channel_attention(*tensors)
        assert torch.equal(output, expected)
        for actual, target in zip(grads, torch.autograd.grad(expected.sum(), tensors), strict=True):
            assert torch.equal(actual, target)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [64, 289])
    def test_saturated_maps(self, tokens: int, dtype: torch.dtype) -> None:
        assert_parity_with_grad(*saturated_inputs(tokens, dtype), dropout_p=0.1, seed=SEED, backend="chunked")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", DEGENERATE)
    def test_degenerate_inputs(self, kind: str, dtype: torch.dtype) -> None:
        assert_parity_with_grad(*degenerate_inputs(kind, dtype), dropout_p=0.1, seed=SEED, backend="chunked")


class TestDropoutMask:
    """The hash mask."""

    def test_pinned_bits(self) -> None:
        """The mask is a public contract: kernels, other versions and resumed runs must see the same."""
        keep = keep_mask(*hash_keys(SEED, 2, 1, 3, 8), 0.5)
        bits = ["".join(map(str, row.int().tolist())) for row in keep.flatten(0, 2)]
        assert bits == ["01001111", "10110011", "01010110", "01111101", "10100101", "10100101"]

    def test_rate_and_independence(self) -> None:
        keep = keep_mask(*hash_keys(SEED, 1, 2, 256, 2048), 0.1).double() - 0.9
        sigma = math.sqrt(0.09)
        assert abs(keep.mean()) < 5 * sigma / math.sqrt(keep.numel())
        for axis in (-1, -2):
            deviation = keep.mean(axis).std().item()
            assert deviation == pytest.approx(sigma / math.sqrt(keep.shape[axis]), rel=0.15)
        rows = keep.flatten(0, 2)
        correlation = (rows @ rows.mT / rows.shape[1] / 0.09).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / math.sqrt(rows.shape[1])

    def test_seed_batch_head_row_and_column_matter(self) -> None:
        keep = keep_mask(*hash_keys(SEED, 2, 2, 64, 64), 0.5)
        others = [keep_mask(*hash_keys(SEED + delta, 2, 2, 64, 64), 0.5) for delta in (1, 1 << 32)]
        for other in (*others, keep.flip(0), keep.flip(1), keep.flip(2), keep.flip(3)):
            assert 0.4 < (keep == other).double().mean() < 0.6

    def test_drawn_from_the_torch_generator_without_a_seed(self) -> None:
        tensors = [x.detach() for x in inputs(1, 1, 5, 4, 32)]
        torch.manual_seed(3)
        first, second = (channel_attention(*tensors, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(channel_attention(*tensors, dropout_p=0.5), first)
        assert not torch.equal(first, second)


class TestRegistration:
    """Autograd, compile and fake tensors."""

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("masked", [True, False])
    def test_gradcheck(self, shared: bool, masked: bool) -> None:
        tensors = inputs(2, 2, 3, 4, 6, shared=shared)
        mask = torch.tensor([True, False, True]) if masked else None

        def attend(*args: Tensor) -> Tensor:
            return channel_attention(*args, group_mask=mask, dropout_p=0.2, seed=SEED)

        assert torch.autograd.gradcheck(attend, tensors)

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, shared: bool, dtype: torch.dtype) -> None:
        ops = torch.ops.allspark_fast
        tensors = inputs(2, 3, 5, 4, 6, shared=shared, dtype=dtype)
        mask = torch.tensor([True, True, False, False, True, True])
        opcheck(ops.channel_attention.default, (*tensors, mask, 1e-5, 0.2, SEED))
        opcheck(ops.channel_attention.default, (*tensors, None, 1e-5, 0.0, None))
        tensors = [x.detach() for x in tensors]
        output, statistics = ops.channel_attention(*tensors, mask, 1e-5, 0.2, SEED)
        opcheck(ops.channel_attention_backward.default, (output, *tensors, statistics, mask, 0.2, SEED))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_as_one_graph(self, dynamic: bool) -> None:
        compiled = torch.compile(channel_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for columns in (6, 9):
            tensors = inputs(2, 1, 5, 4, columns)
            options = {"group_mask": torch.tensor([True, False, True]), "dropout_p": 0.2, "seed": SEED}
            actual = compiled(*tensors, **options)
            torch.testing.assert_close(actual, channel_attention(*tensors, **options))

    def test_second_backward_is_a_clear_error(self) -> None:
        tensors = inputs(1, 1, 5, 4, 6)
        loss = channel_attention(*tensors).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


class TestMemory:
    """What is kept for backward."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kept_at_pascal_size(self, dtype: torch.dtype) -> None:
        """The inputs, and two numbers a row: B=2, N=289, C=512, H=2, K=21."""
        with FakeTensorMode():
            shapes = [(2, 1, 289, 1024), *[(1, 1, 289, 21 * 1024)] * 2]
            tensors = [torch.empty(x, dtype=dtype, requires_grad=True) for x in shapes]
            seed = torch.empty((), dtype=torch.int64)
            kept = saved_bytes(lambda: channel_attention(*tensors, dropout_p=0.1, seed=seed))
        assert kept == sum(x.nbytes for x in tensors) + 2 * 2 * 1024 * 4 + seed.nbytes


BAD_ARGUMENTS = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query must be a tensor"),
    "query dtype": ({"query": torch.ones(2, 1, 5, 4, dtype=torch.int64)}, TypeError, "query must have dtype"),
    "query axes": ({"query": torch.ones(2, 5, 4)}, ValueError, r"query must have shape \(B, H, N, Cq\)"),
    "no tokens": ({"query": torch.ones(2, 1, 0, 4)}, ValueError, "query has N = 0"),
    "key dtype": ({"key": torch.ones(1, 1, 5, 6).double()}, TypeError, "key must have dtype float32"),
    "key tokens": ({"key": torch.ones(1, 1, 7, 6)}, ValueError, r"key must have shape .* \(1, 1, 5, 6\)"),
    "key batch": ({"key": torch.ones(3, 1, 5, 6)}, ValueError, r"key must have shape .* \(2, 1, 5, 6\)"),
    "key device": ({"key": torch.ones(1, 1, 5, 6, device="meta")}, ValueError, "key is on meta, expected cpu"),
    "no columns": ({"key": torch.ones(1, 1, 5, 0)}, ValueError, "key has L = 0"),
    "value shape": ({"value": torch.ones(1, 1, 5, 7)}, ValueError, "value must have shape the shape of key"),
    "mask dtype": ({"group_mask": torch.ones(3)}, TypeError, "group_mask must have dtype bool"),
    "mask axes": ({"group_mask": torch.ones(3, 1).bool()}, ValueError, r"group_mask must have shape \(G,\)"),
    "group sizes": ({"group_mask": torch.ones(4).bool()}, ValueError, "4 groups, which do not divide .* L = 6"),
    "no groups": ({"group_mask": torch.ones(0).bool()}, ValueError, "0 groups"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be above 0"),
    "eps of 0": ({"eps": 0}, ValueError, "eps must be above 0"),
    "eps type": ({"eps": "0"}, TypeError, "eps must be a number, got '0'"),
    "dropout type": ({"dropout_p": None}, TypeError, "dropout_p must be a number, got None"),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    "seed dtype": ({"seed": torch.ones(())}, TypeError, "seed must have dtype int64"),
    "seed shape": ({"seed": torch.ones(1).long()}, ValueError, r"seed must have shape \(\)"),
    "backend": ({"backend": "flash"}, ValueError, "backend must be one of auto, .*got 'flash'"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    good = {"query": torch.ones(2, 1, 5, 4), "key": torch.ones(1, 1, 5, 6), "value": torch.ones(1, 1, 5, 6)}
    with pytest.raises(error, match=message):
        channel_attention(**{**good, **change})
