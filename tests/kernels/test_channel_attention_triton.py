"""The Triton kernels of channel attention, interpreted: parity with the float64 reference, memory, registration."""

import weakref
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from allspark_fast.kernels.channel_attention import channel_attention
from tests.helpers.triton_checks import checked_memory, exact_bfloat16, uninitialized_memory_is_nan
from tests.kernels.test_channel_attention import (
    DEGENERATE,
    SEED,
    assert_equal_to_reference,
    assert_parity_with_grad,
    degenerate_inputs,
    inputs,
    output_and_grads,
    saturated_inputs,
)

# isort: split
from allspark_fast.kernels.channel_attention import kernel, row_kernels
from allspark_fast.kernels.channel_attention.inputs import Inputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GROUP_MASK = torch.tensor([True, False, True])
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SLOW_TOKENS = [(9, 0.0), (81, 0.0), (289, 0.0), (289, 0.2)]


pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # how numpy announces a NaN


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time, products in several pieces, and tiles that small inputs do not fit into."""
    small = {"WORKSPACE_BYTES": 0, "PIECE_COLUMNS": 64, "ROW_COLUMNS": 64, "TILE_COLUMNS": 64}
    for name, value in small.items():
        monkeypatch.setattr(kernel, name, value)


def assert_parity(tensors: list[Tensor], **options: object) -> None:
    assert_equal_to_reference(tensors, TOLERANCE[tensors[0].dtype], backend="triton", seed=SEED, **options)


class TestParity:
    """Output and gradients against the materialised reference in float64."""

    @pytest.mark.parametrize(
        ("tokens", "dropout_p"),
        [(1, 0.0), (16, 0.0), (25, 0.2), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_TOKENS)],
    )
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_tokens(self, tokens: int, dtype: torch.dtype, dropout_p: float) -> None:
        tensors = inputs(2, 1, tokens, 17, 57, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=dropout_p)

    @pytest.mark.parametrize("tokens", [27, pytest.param(325, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_odd_sizes_that_stand_for_cityscapes_and_vit(self, tokens: int, dtype: torch.dtype) -> None:
        """Tokens modulo the tiles as of 676 and 1369."""
        assert_parity(inputs(1, 1, tokens, 33, 70, dtype=dtype), dropout_p=0.1)

    @pytest.mark.usefixtures("small_workspace")
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_parts_and_pieces(self, dtype: torch.dtype, shared: bool) -> None:
        tensors = inputs(2, 1, 17, 9, 192, shared=shared, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=0.2)

    @pytest.mark.usefixtures("small_workspace")
    def test_columns_that_do_not_divide(self) -> None:
        assert_parity(inputs(2, 1, 9, 11, 105, dtype=torch.float32), group_mask=GROUP_MASK)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("tokens", [64, pytest.param(289, marks=pytest.mark.slow)])
    def test_saturated_maps(self, tokens: int, dtype: torch.dtype) -> None:
        assert_parity_with_grad(*saturated_inputs(tokens, dtype), dropout_p=0.1, seed=SEED, backend="triton")

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            *((kind, torch.bfloat16) for kind in DEGENERATE),
            *((kind, torch.float16) for kind in ("small value", "large gradient", "no gradient")),
            *(pytest.param(kind, torch.float32, marks=pytest.mark.slow) for kind in DEGENERATE),
        ],
    )
    def test_degenerate_inputs(self, kind: str, dtype: torch.dtype) -> None:
        assert_parity_with_grad(*degenerate_inputs(kind, dtype), dropout_p=0.1, seed=SEED, backend="triton")

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(
        batch=st.integers(1, 3),
        heads=st.integers(1, 2),
        tokens=st.integers(1, 40),
        channels=st.integers(1, 40),
        groups=st.integers(1, 4),
        group=st.integers(2, 30),  # what a map of one column gives is rounding alone
        shared=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.3]),
        masked=st.integers(0, 15),
    )
    def test_any_shape(
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
        tensors = inputs(batch, heads, tokens, channels, groups * group, shared=shared, dtype=torch.float32)
        mask = torch.tensor([masked >> i & 1 == 0 for i in range(groups)])
        # Gradients of maps of a few numbers are small differences.
        assert_equal_to_reference(tensors, 1e-4, backend="triton", seed=SEED, group_mask=mask, dropout_p=dropout_p)

    @pytest.mark.parametrize("strides", ["tokens last", "padded", "heads inside"])
    def test_strides(self, strides: str) -> None:
        query, key, value = (x.detach() for x in inputs(2, 3, 9, 5, 7, shared=False, dtype=torch.float32))
        layout = {
            "tokens last": lambda x: x.mT.contiguous().mT,
            "padded": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
            "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        }[strides]
        assert_parity([layout(x).requires_grad_() for x in (query, key, value)])

    @pytest.mark.slow
    @pytest.mark.parametrize("tokens", [676, 1369])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_full_size(self, tokens: int, dtype: torch.dtype) -> None:
        assert_parity(inputs(1, 1, tokens, 192, 3 * 192, dtype=dtype), group_mask=GROUP_MASK, dropout_p=0.1)


class TestEdges:
    """Inputs at the edge of what is sensible."""

    @pytest.mark.parametrize("shared", [True, False])
    def test_empty_batch(self, shared: bool) -> None:
        tensors = inputs(0, 2, 9, 5, 7, shared=shared, dtype=torch.float32)
        for result, x in zip(output_and_grads(tensors, backend="triton"), [tensors[0], *tensors], strict=True):
            assert torch.equal(result, torch.zeros_like(x))

    @pytest.mark.usefixtures("small_workspace")
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_all_groups_masked_gives_zeros_and_zero_gradients(self, dtype: torch.dtype) -> None:
        tensors = inputs(2, 1, 7, 5, 300, dtype=dtype)
        for x in output_and_grads(tensors, group_mask=torch.zeros(3, dtype=torch.bool), backend="triton"):
            assert torch.equal(x, torch.zeros_like(x))

    @pytest.mark.parametrize("mean", [10.0, 100.0])
    def test_large_means(self, mean: float) -> None:
        """The mean is a shift that the norm takes out: the error is that of the inputs, relative to their spread."""
        tensors = inputs(2, 1, 25, 17, 57, dtype=torch.float32, mean=mean)
        assert_equal_to_reference(tensors, 1e-5 * mean, backend="triton")

    def test_constant_inputs_attend_evenly(self) -> None:
        query, key = torch.full((1, 1, 9, 5), 2.0), torch.full((1, 1, 9, 7), 3.0)
        value = torch.randn(1, 1, 9, 7)
        output = channel_attention(query, key, value, backend="triton")
        torch.testing.assert_close(output, value.mean(-1, keepdim=True).expand(-1, -1, -1, 5))

    def test_huge_outlier(self) -> None:
        query, key, value = (x.detach() for x in inputs(2, 1, 25, 17, 57, dtype=torch.float32))
        key[0, 0, 3, 11] = 1e4
        assert_parity([x.requires_grad_() for x in (query, key, value)])

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_non_finite_inputs_show(self, which: int) -> None:
        tensors = [x.detach() for x in inputs(1, 1, 9, 5, 7, dtype=torch.float32)]
        tensors[which][0, 0, 0, 0] = torch.inf
        assert not channel_attention(*tensors, backend="triton").isfinite().all()


class TestDropoutMask:
    """The hash in registers against the one in torch."""

    @pytest.mark.usefixtures("small_workspace")
    @pytest.mark.parametrize(
        ("dropout_p", "shared"),
        [(0.1, True), (0.1, False), *(pytest.param(x, True, marks=pytest.mark.slow) for x in (1e-9, 0.999))],
    )
    def test_mask_is_that_of_the_other_backends(self, dropout_p: float, shared: bool) -> None:
        """With even weights and one-hot values the output is the mask itself, in forward and in backward."""
        columns = 70
        query, key = torch.zeros(2, 2, columns, 5), torch.zeros(1 if shared else 2, 2, columns, columns)
        value = torch.eye(columns).expand_as(key).contiguous().requires_grad_()
        masks = []
        for backend in ("triton", "chunked", "reference"):
            output = channel_attention(query, key, value, dropout_p=dropout_p, seed=SEED, backend=backend)
            (grad,) = torch.autograd.grad(output, value, torch.ones_like(output))
            masks.append((output > 0, grad.round(decimals=4)))
        for mask, grad in masks[1:]:
            assert torch.equal(mask, masks[0][0])
            assert torch.allclose(grad, masks[0][1], rtol=1e-4)

    def test_seeds_of_64_bits(self) -> None:
        query, key, value = (x.detach() for x in inputs(1, 1, 9, 5, 64, dtype=torch.float32))
        for seed in (0, 1, -1, 2**63 - 1, -(2**63), 1 << 32):
            options = {"dropout_p": 0.5, "seed": torch.tensor(seed)}
            expected = channel_attention(query, key, value, backend="chunked", **options)
            torch.testing.assert_close(channel_attention(query, key, value, backend="triton", **options), expected)


class TestMemory:
    """What the kernels touch, and what they need."""

    @pytest.mark.usefixtures("small_workspace")
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
    def test_bounds_and_races(self, dtype: torch.dtype, shared: bool) -> None:
        tensors = inputs(2, 1, 20, 10, 150, shared=shared, dtype=dtype)
        with checked_memory():
            output_and_grads(tensors, group_mask=GROUP_MASK, dropout_p=0.1, seed=SEED, backend="triton")

    @pytest.mark.parametrize(("batch", "tokens"), [(1, 289), (4, 289), (16, 289), (2, 676), (4, 1369)])
    def test_workspace_is_bounded(self, batch: int, tokens: int) -> None:
        """A map of the samples that fit in forward, two in backward, and tensors of the size of the inputs."""
        rows, columns = batch * 1024, 21 * 1024
        one_map = columns * 1024 * 2
        keys, query = columns * tokens * 2, rows * tokens * 2
        forward_live, backward_live = _LiveBytes(), _LiveBytes()
        launchers = {name: _NoKernel() for name in dir(row_kernels) if name.endswith("_kernel")}
        with FakeTensorMode(), patch.multiple(row_kernels, **launchers), patch.object(kernel, "_product", _no_product):
            tensors = torch.empty(batch, 1, tokens, 1024).bfloat16(), *torch.empty(2, 1, 1, tokens, columns).bfloat16()
            inputs = Inputs(*tensors, None, 0.0, None)
            with forward_live:
                output, statistics = kernel.forward(inputs, 1e-5)
            with backward_live:
                kernel.backward(output, statistics, inputs)
        # Pieces of float32 are twice a query each; sums are a number for each row and tile.
        small = (3 + 2 * 8) * query + 4 * rows * (4 * 42 + 16)
        assert forward_live.peak <= max(kernel.WORKSPACE_BYTES, one_map) + keys + small
        # The last: one copy of the keys, and gradients of keys and values that may be float32.
        assert backward_live.peak <= max(kernel.WORKSPACE_BYTES, 2 * one_map) + keys + 6 * keys + small


def _no_product(_a: Tensor, _b: Tensor, out: Tensor, **_: object) -> Tensor:
    """Unlike a mock it does not keep its arguments."""
    return out


class _NoKernel:
    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *args, **kwargs: None


class _LiveBytes(TorchDispatchMode):
    """The bytes that new tensors hold at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, Tensor) and not func.is_view and not func._schema.is_mutable:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


class TestRegistration:
    """One op for every backend: fake tensors, compile, opcheck, dispatch."""

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_traces_for_cuda_without_a_gpu(self, backend: str) -> None:
        with FakeTensorMode():
            query = torch.empty(2, 1, 9, 5, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            key = torch.empty(1, 1, 9, 12, dtype=torch.bfloat16, device="cuda")
            mask, seed = torch.ones(12, dtype=torch.bool, device="cuda"), torch.zeros((), dtype=int, device="cuda")
            output = channel_attention(query, key, key, group_mask=mask, dropout_p=0.1, backend=backend)
            # Autograd's engine asks for the device, so backward is traced as the operator that it calls.
            statistics = torch.empty(2, 2, 1, 5, device="cuda")
            backward = torch.ops.allspark_fast.channel_attention_backward
            grads = backward(output, query, key, key, statistics, mask, 0.1, seed, backend)
        assert output.requires_grad
        for x, like in zip((output, *grads), (query, query, key, key), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)

    @pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_opcheck(self, shared: bool) -> None:
        tensors = inputs(2, 1, 3, 5, 12, shared=shared, dtype=torch.float32)
        mask = torch.arange(12) % 3 > 0
        ops = torch.ops.allspark_fast
        opcheck(ops.channel_attention.default, (*tensors, mask, 1e-5, 0.2, SEED, "triton"))
        tensors = [x.detach() for x in tensors]
        output, statistics = ops.channel_attention(*tensors, mask, 1e-5, 0.2, SEED, "triton")
        opcheck(ops.channel_attention_backward.default, (output, *tensors, statistics, mask, 0.2, SEED, "triton"))

    def test_compiles_without_a_graph_break(self) -> None:
        tensors = inputs(2, 1, 7, 5, 12, dtype=torch.float32)
        compiled = torch.compile(channel_attention, backend="aot_eager", fullgraph=True, dynamic=True)
        options = {"group_mask": GROUP_MASK, "dropout_p": 0.1, "seed": SEED, "backend": "triton"}
        torch.testing.assert_close(compiled(*tensors, **options), channel_attention(*tensors, **options))

    def test_statistics_are_those_of_chunked(self) -> None:
        """A backward pass may run where the forward pass did not."""
        tensors = [x.detach() for x in inputs(2, 2, 9, 5, 70, dtype=torch.float32)]
        mask = torch.arange(70) % 3 > 0
        op = torch.ops.allspark_fast.channel_attention
        triton, chunked = (op(*tensors, mask, 1e-5, 0.0, None, backend)[1] for backend in ("triton", "chunked"))
        torch.testing.assert_close(triton, chunked)

    def test_cpu_tensors_need_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("allspark_fast.kernels.triton_support._INTERPRETED", False)
        with pytest.raises(ValueError, match=r"needs CUDA tensors .* query is on cpu"):
            channel_attention(*inputs(1, 1, 3, 4, 5, dtype=torch.float32), backend="triton")

    def test_missing_triton_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("allspark_fast.kernels.triton_support._INSTALLED", False)
        with pytest.raises(ValueError, match="triton, which is not installed"):
            channel_attention(*inputs(1, 1, 3, 4, 5, dtype=torch.float32), backend="triton")

    def test_float64_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no kernels for .*float64"):
            channel_attention(*inputs(1, 1, 3, 4, 5), backend="triton")
