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

from allspark_fast.kernels.channel_attention import channel_attention, chunked, configs
from tests.helpers.triton_checks import checked_memory, exact_bfloat16, uninitialized_memory_is_nan
from tests.kernels.test_channel_attention import SEED, assert_equal_to_reference, inputs, output_and_grads

# isort: split
from allspark_fast.kernels.channel_attention import kernel, one_pass

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GROUP_MASK = torch.tensor([True, False, True])


pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # how numpy announces a NaN


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 columns, so that small inputs need several."""
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(kernel, "MIN_COLUMNS", 128)


def assert_parity(tensors: list[Tensor], **options: object) -> None:
    assert_equal_to_reference(tensors, TOLERANCE[tensors[0].dtype], backend="triton", seed=SEED, **options)


class TestParity:
    """Output and gradients against the materialised reference in float64."""

    @pytest.mark.parametrize(
        ("tokens", "dropout_p"), [(1, 0.0), (9, 0.0), (16, 0.0), (25, 0.2), (81, 0.0), (289, 0.0), (289, 0.2)]
    )
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_tokens(self, tokens: int, dtype: torch.dtype, dropout_p: float) -> None:
        tensors = inputs(2, 1, tokens, 17, 57, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=dropout_p)

    @pytest.mark.parametrize("tokens", [27, 325])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_odd_sizes_that_stand_for_cityscapes_and_vit(self, tokens: int, dtype: torch.dtype) -> None:
        """Tokens modulo the tiles as of 676 and 1369, both sides of the limit where the merge kernel's tile changes."""
        assert_parity(inputs(1, 1, tokens, 33, 70, dtype=dtype), dropout_p=0.1)

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_several_chunks_and_a_ragged_last_one(self, dtype: torch.dtype, dropout_p: float, shared: bool) -> None:
        tensors = inputs(3, 2, 19, 43, 300, shared=shared, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=dropout_p)

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_kernels_alone(self, dtype: torch.dtype, dropout_p: float) -> None:
        """The registered operator, without the norm, against the chunked form in float64 on the same inputs."""
        query, key, value = (x.detach() for x in inputs(2, 2, 37, 21, 300, dtype=dtype))
        grad, scale = torch.randn_like(query), torch.tensor([0.1, 0.2, 0.3, 0.4]).view(2, 2, 1, 1)
        mask = torch.arange(300) % 7 > 0
        options = (mask, dropout_p, SEED)
        tensors = (query.float(), key, value, scale, torch.zeros(1, 2, 37, 1))
        output, lse = kernel.forward(*tensors, *options)
        grads = kernel.backward(grad, *tensors, output, lse, *options)
        doubles = [x.double() for x in tensors]
        expected, expected_lse = chunked.forward(*doubles, *options)
        expected_grads = chunked.backward(grad.double(), *doubles, expected, expected_lse, *options)
        # The scale's gradient is a sum over its map whose terms nearly cancel.
        factors = (1, 1, 1, 1, 3)
        for x, target, factor in zip((output, *grads), (expected, *expected_grads), factors, strict=True):
            assert (x - target).abs().max() <= factor * TOLERANCE[dtype] * target.abs().max()
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("masked", ["first", "last"])
    def test_whole_chunks_are_masked(self, masked: str) -> None:
        mask = torch.tensor([masked == "last", masked == "first"])
        assert_parity(inputs(2, 1, 9, 5, 512, dtype=torch.float32), group_mask=mask)

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


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and schedules of sm_90."""
    monkeypatch.setattr(configs, "device_class", lambda _: "sm_90")


@pytest.fixture(params=[0, 1])
def choice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Takes this one of the tiles for the first kernel to choose from, or the last; lists those that were taken."""
    taken = []

    def select(_: str, __: object, choices: list[object], ___: object) -> object:
        of_kernel = [tiles for tiles in choices if isinstance(tiles, type(choices[0]))]
        taken.append(of_kernel[min(request.param, len(of_kernel) - 1)])
        return taken[-1]

    monkeypatch.setattr(kernel, "_select", select)
    return taken


@pytest.mark.usefixtures("hopper")
class TestHopper:
    """The one-pass forward, and the larger tiles of the split softmax."""

    @pytest.mark.parametrize(
        ("dtype", "tokens", "shared", "max_parts"),
        [
            (torch.bfloat16, 289, True, 8),
            (torch.bfloat16, 225, False, 1),
            (torch.float16, 289, False, 2),
            (torch.float16, 256, True, 8),
        ],
    )
    def test_one_pass(
        self,
        dtype: torch.dtype,
        tokens: int,
        shared: bool,
        max_parts: int,
        choice: list[object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(one_pass, "_MAX_PARTS", max_parts)
        tensors = inputs(2, 2, tokens, 37, 216, shared=shared, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=0.2)
        assert isinstance(choice[0], configs.OnePassTile)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_masked_parts(self, groups: int) -> None:
        """All columns, or those of whole parts."""
        tensors = inputs(1, 1, 289, 5, 216, dtype=torch.bfloat16)
        assert_parity(tensors, group_mask=torch.arange(groups) == 1)

    def test_other_sizes_fall_to_the_split_softmax(self, choice: list[object]) -> None:
        for tokens, columns in ((192, 64), (305, 64), (289, 63)):
            assert_parity(inputs(1, 1, tokens, 5, columns, dtype=torch.bfloat16), dropout_p=0.2)
        assert not any(isinstance(tiles, configs.OnePassTile) for tiles in choice)

    @pytest.mark.usefixtures("choice")
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_split_softmax(self, dtype: torch.dtype) -> None:
        assert_parity(inputs(2, 1, 67, 37, 300, dtype=dtype), group_mask=GROUP_MASK, dropout_p=0.2)

    @pytest.mark.usefixtures("choice")
    @pytest.mark.parametrize("shared", [True, False])
    def test_bounds_and_races(self, shared: bool) -> None:
        query, key, value = (x.detach() for x in inputs(2, 1, 259, 37, 72, shared=shared, dtype=torch.bfloat16))
        mask = torch.arange(72) % 7 > 0
        with checked_memory():
            kernel.forward(
                query.float(), key, value, torch.ones(2, 1, 1, 1), torch.zeros(1, 1, 259, 1), mask, 0.1, SEED
            )


class TestEdges:
    """Inputs at the edge of what is sensible."""

    @pytest.mark.parametrize("shared", [True, False])
    def test_empty_batch(self, shared: bool) -> None:
        tensors = inputs(0, 2, 9, 5, 7, shared=shared, dtype=torch.float32)
        for result, x in zip(output_and_grads(tensors, backend="triton"), [tensors[0], *tensors], strict=True):
            assert torch.equal(result, torch.zeros_like(x))

    @pytest.mark.usefixtures("small_chunks")
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

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize(("dropout_p", "shared"), [(1e-9, True), (0.1, True), (0.1, False), (0.999, True)])
    def test_mask_is_that_of_the_other_backends(self, dropout_p: float, shared: bool) -> None:
        """With even weights and one-hot values the output is the mask itself, in forward and in backward."""
        columns = 150
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

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bounds_and_races(self, dtype: torch.dtype, shared: bool) -> None:
        tensors = inputs(2, 1, 67, 71, 201, shared=shared, dtype=dtype)
        with checked_memory():
            output_and_grads(tensors, group_mask=GROUP_MASK, dropout_p=0.1, seed=SEED, backend="triton")

    @pytest.mark.parametrize(("batch", "tokens"), [(1, 289), (4, 289), (16, 289), (2, 676), (4, 1369)])
    def test_workspace_is_bounded(self, batch: int, tokens: int) -> None:
        """Forward takes one chunk, backward two, of 64 MiB or 1024 columns, and copies of its inputs: never a map."""
        rows, columns = batch * 1024, 21 * 1024
        chunk = max(64 * 2**20, 1024 * rows * 2)
        keys, query_float32 = columns * tokens * 2, rows * tokens * 4
        forward_live, backward_live = _LiveBytes(), _LiveBytes()
        no_kernels = dict.fromkeys(["_probability_kernel", "_merge_kernel", "_gradient_kernel"], _NoKernel())
        with FakeTensorMode(), patch.multiple(kernel, **no_kernels):
            query, scale = torch.empty(batch, 1, tokens, 1024), torch.empty(batch, 1, 1, 1)
            key = torch.empty(1, 1, tokens, columns, dtype=torch.bfloat16)
            mean = torch.empty(1, 1, tokens, 1)
            with forward_live:
                output, lse = kernel.forward(query, key, key, scale, mean, None, 0.0, None)
            with backward_live:
                kernel.backward(output, query, key, key, scale, mean, output, lse, None, 0.0, None)
        # Tile statistics are 8 bytes for each row and tile of 128 columns.
        statistics = 8 * rows * (8192 // 128)
        assert forward_live.peak <= chunk + 4 * query_float32 + statistics
        assert backward_live.peak <= 2 * chunk + 3 * keys + 8 * query_float32


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
            if (
                isinstance(x, Tensor)
                and not func.is_view
                and "out" not in (kwargs or {})
                and not func._schema.is_mutable
            ):
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
            lse, scale, mean = (torch.empty(x, device="cuda") for x in ((2, 1, 1, 5), (2, 1, 1, 1), (1, 1, 9, 1)))
            backward = torch.ops.allspark_fast.softmax_attention_backward
            grads = backward(output, query.float(), key, key, scale, mean, output, lse, mask, 0.1, seed, backend)
        assert output.requires_grad
        for x, like in zip((output, *grads), (query, query.float(), key, key, scale), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)

    @pytest.mark.parametrize("shared", [True, False])
    def test_opcheck(self, shared: bool) -> None:
        tensors = inputs(2, 3, 7, 5, 12, shared=shared, dtype=torch.float32)
        tensors += [torch.rand(2, 3, 1, 1), torch.randn(1 if shared else 2, 3, 7, 1)]
        mask = torch.arange(12) % 3 > 0
        ops = torch.ops.allspark_fast
        opcheck(ops.softmax_attention.default, (*tensors, mask, 0.2, SEED, "triton"))
        tensors = [x.detach() for x in tensors]
        output, lse = ops.softmax_attention(*tensors, mask, 0.2, SEED, "triton")
        arguments = (torch.randn_like(output), *tensors, output, lse, mask, 0.2, SEED, "triton")
        opcheck(ops.softmax_attention_backward.default, arguments)

    def test_compiles_without_a_graph_break(self) -> None:
        tensors = inputs(2, 1, 7, 5, 12, dtype=torch.float32)
        compiled = torch.compile(channel_attention, backend="aot_eager", fullgraph=True, dynamic=True)
        options = {"group_mask": GROUP_MASK, "dropout_p": 0.1, "seed": SEED, "backend": "triton"}
        torch.testing.assert_close(compiled(*tensors, **options), channel_attention(*tensors, **options))

    def test_lse_is_that_of_chunked(self) -> None:
        query, key, value = (x.detach() for x in inputs(2, 2, 9, 5, 70, dtype=torch.float32))
        mask = torch.arange(70) % 3 > 0
        arguments = (query, key, value, torch.rand(2, 2, 1, 1), torch.randn(1, 2, 9, 1), mask, 0.0, None)
        torch.testing.assert_close(kernel.forward(*arguments), chunked.forward(*arguments))

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
