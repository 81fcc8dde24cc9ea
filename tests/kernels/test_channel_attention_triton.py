"""The Triton kernels of channel attention, interpreted: parity with the float64 reference, memory, registration."""

import weakref
from collections import defaultdict
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from allspark_fast.kernels.channel_attention import channel_attention
from tests.helpers.triton_checks import exact_bfloat16, uninitialized_memory_is_nan
from tests.kernels.test_channel_attention import (
    SEED,
    SHAPES,
    BackendTests,
    assert_equal_to_reference,
    assert_parity_on_shape,
    inputs,
)

# isort: split
from allspark_fast.kernels.channel_attention import kernel, row_kernels
from allspark_fast.kernels.channel_attention.inputs import Inputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GROUP_MASK = torch.tensor([True, False, True])
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SLOW_TOKENS = [(9, 0.0), (81, 0.0), (289, 0.0), (289, 0.2), (325, 0.1), (676, 0.1), (1369, 0.1)]


pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # how numpy announces a NaN


@pytest.fixture(autouse=True)
def strict_interpreter():
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


@pytest.fixture
def small_workspace(monkeypatch):
    """One sample at a time, products in several pieces, and tiles that small inputs do not fit into."""
    small = {"WORKSPACE_BYTES": 0, "PIECE_COLUMNS": 64, "ROW_COLUMNS": 64, "TILE_COLUMNS": 64}
    for name, value in small.items():
        monkeypatch.setattr(kernel, name, value)


def assert_parity(tensors, **options):
    assert_equal_to_reference(tensors, TOLERANCE[tensors[0].dtype], **{"backend": "triton", "seed": SEED} | options)


class TestParity:
    @pytest.mark.parametrize(
        ("tokens", "dropout_p"),
        [(1, 0.0), (16, 0.0), (25, 0.2), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_TOKENS)],
    )
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_tokens(self, tokens, dtype, dropout_p):
        assert_parity(inputs(2, 1, tokens, 17, 57, dtype=dtype), group_mask=GROUP_MASK, dropout_p=dropout_p)

    @pytest.mark.usefixtures("small_workspace")
    @pytest.mark.parametrize(("shared", "columns"), [(True, 192), (False, 192), (True, 105)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_parts_and_pieces(self, dtype, shared, columns):
        """Columns of an odd number make one piece."""
        tensors = inputs(2, 1, 17, 9, columns, shared=shared, dtype=dtype)
        assert_parity(tensors, group_mask=GROUP_MASK, dropout_p=0.2)

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(SHAPES)
    def test_any_shape(self, shape):
        """Gradients of maps of a few numbers are small differences."""
        assert_parity_on_shape(shape, torch.float32, 1e-4, "triton")


@pytest.mark.usefixtures("small_workspace")
class TestTriton(BackendTests):
    """In several parts and tiles."""

    backend = "triton"


@pytest.mark.parametrize(
    ("dropout_p", "seed"),
    [(0.5, 0), (0.5, 1), (0.5, -1), (0.5, 2**63 - 1), (0.5, -(2**63)), (0.5, 1 << 32), (1e-9, 0), (0.999, 0)],
)
def test_the_hash_in_registers_is_that_of_torch(dropout_p, seed):
    assert_parity(inputs(2, 1, 9, 5, 64, dtype=torch.float32), dropout_p=dropout_p, seed=torch.tensor(seed))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 289), (4, 289), (16, 289), (2, 676), (4, 1369)])
def test_workspace_is_bounded(batch, tokens):
    """A map of the samples that fit in forward, two in backward, and tensors of the size of the inputs."""
    rows, columns = batch * 1024, 21 * 1024
    one_map = columns * 1024 * 2
    keys, query = columns * tokens * 2, rows * tokens * 2
    forward_live, backward_live = _LiveBytes(), _LiveBytes()
    # Unlike mocks they do not keep their arguments.
    launcher = defaultdict(lambda: lambda *_, **__: None)
    launchers = {name: launcher for name in dir(row_kernels) if name.endswith("_kernel")}
    product = patch.object(kernel, "_product", lambda _a, _b, out, **_: out)
    with FakeTensorMode(), patch.multiple(row_kernels, **launchers), product:
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


class _LiveBytes(TorchDispatchMode):
    """The bytes that new tensors hold at once, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, Tensor) and not func.is_view and not func._schema.is_mutable:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage):
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size):
        self.now -= size


def test_what_cannot_run_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"cannot run: there are no kernels for torch\.float64"):
        channel_attention(*inputs(1, 1, 3, 4, 5), backend="triton")
    monkeypatch.setattr("allspark_fast.kernels.triton_support._INTERPRETED", False)
    with pytest.raises(ValueError, match="cannot run: the device is cpu"):
        channel_attention(*inputs(1, 1, 3, 4, 5, dtype=torch.float32), backend="triton")
    monkeypatch.setattr("allspark_fast.kernels.triton_support._INSTALLED", False)
    with pytest.raises(ValueError, match="cannot run: the package triton is not installed"):
        channel_attention(*inputs(1, 1, 3, 4, 5, dtype=torch.float32), backend="triton")
