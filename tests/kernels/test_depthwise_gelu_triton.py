"""The Triton kernels of depthwise convolution + GELU, interpreted, against torch's two functions in float64."""

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from allspark_fast.kernels import triton_support, tuning
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu, op, reference
from allspark_fast.kernels.depthwise_gelu.configs import BACKWARD_TILES, FORWARD_TILES, Tile
from allspark_fast.model import mit
from allspark_fast.model.mit import MixFFN
from tests.kernels.test_depthwise_gelu import example, expected_output, output_and_grads
from tests.kernels.triton_checks import checked_memory, exact_bfloat16, uninitialized_memory_is_nan

from allspark_fast.kernels.depthwise_gelu import kernel  # isort: skip  (skipped above where triton is missing)


# How numpy announces NaN, and what is far from zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# So that small maps have several.
SMALL = Tile(2, 4, 16, num_warps=4)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the kernels."""
    monkeypatch.setattr(triton_support, "_is_fast_on", lambda _: True)
    monkeypatch.setattr(triton_support, "_disabled", set())


def run(leaves: list[Tensor], size: tuple[int, int], tile: Tile = SMALL) -> list[Tensor]:
    """Output and gradients, as ``output_and_grads`` weights them."""
    arguments = [x.detach() for x in leaves]
    output = kernel.forward(*arguments, size, tile)
    grad = torch.arange(output.numel()).remainder(7).sub(3).view(output.shape).to(output.dtype)
    return [output, *kernel.backward(grad, *arguments, size, tile)]


def assert_right(leaves: list[Tensor], size: tuple[int, int], tile: Tile = SMALL) -> None:
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = output_and_grads(expected_output(*exact, size), exact)
    for x, y, like in zip(run(leaves, size, tile), expected, (leaves[0], *leaves), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        assert x.is_contiguous()
        scale = max(1.0, y.abs().max().item())
        tolerance = max(TOLERANCE[x.dtype], TOLERANCE[leaves[0].dtype])
        assert (x.double() - y).abs().max() <= tolerance * scale


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    channels=st.integers(1, 18),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_any_size(batch: int, size: tuple[int, int], channels: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    assert_right(example(batch, size, channels, dtype), size)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 1), (2, 4), (3, 5)])
def test_edges_of_maps_and_tiles(size: tuple[int, int]) -> None:
    assert_right(example(1, size, 3, torch.float32), size)


@pytest.mark.parametrize("tile", dict.fromkeys(FORWARD_TILES + BACKWARD_TILES), ids=str)
def test_tiles_of_the_table(tile: Tile) -> None:
    assert_right(example(1, (18, 9), 65, torch.float32), (18, 9), tile)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_of_another_precision(dtype: torch.dtype) -> None:
    tokens, weight, bias = example(1, (3, 5), 6, torch.float32)
    assert_right([tokens.to(dtype), weight, bias.half()], (3, 5))
    assert_right([tokens, weight.to(dtype), bias.to(dtype)], (3, 5))


def test_no_rows_and_no_channels() -> None:
    for shape in ((0, 4), (2, 0)):
        leaves = example(shape[0], (3, 5), shape[1], torch.float32)
        output, *grads = run(leaves, (3, 5))
        assert [x.shape for x in (output, *grads)] == [x.shape for x in (leaves[0], *leaves)]
        assert not any(x.any() for x in grads)


def test_gelu_is_as_exact_as_that_of_torch() -> None:
    """By the middle of the window alone, over numbers small and large."""
    x = torch.linspace(-14, 14, 8000).view(1, -1, 1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1
    arguments = x, weight, torch.zeros(1)
    tile = Tile(1, 8192, 1, num_warps=4)
    size = (1, x.numel())
    exact = gelu(x.double())
    assert (kernel.forward(*arguments, size, tile) - exact).abs().max() <= 3e-7
    assert (gelu(x) - exact).abs().max() >= 3e-7
    slope = kernel.backward(torch.ones_like(x), *arguments, size, tile)[0]
    wide = x.double().requires_grad_()
    assert (slope - torch.autograd.grad(gelu(wide).sum(), wide)[0]).abs().max() <= 5e-7
    far = torch.tensor([-3e38, -1e20, -100.0, -0.0, 100.0, 1e20, 3e38]).view(1, -1, 1)
    assert torch.equal(kernel.forward(far, *arguments[1:], (1, 7), tile), far.clamp(min=0))
    assert torch.equal(
        kernel.backward(torch.ones_like(far), far, *arguments[1:], (1, 7), tile)[0],
        torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]).view(1, -1, 1),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    leaves = example(1, (4, 5), 3, torch.float32)
    with torch.no_grad():
        leaves[0][0, 2 * 5 + 3, 1] = bad
    output, grad_tokens, grad_weight, grad_bias = run(leaves, (4, 5))
    reached = torch.zeros(1, 4, 5, 3, dtype=torch.bool)
    reached[:, 1:4, 2:5, 1] = True
    assert output.unflatten(1, (4, 5))[~reached].isfinite().all()
    assert not output.unflatten(1, (4, 5))[reached].isfinite().all()
    assert not grad_tokens.isfinite().all()
    for x in (grad_weight, grad_bias):
        assert (x.isfinite().flatten(1).all(1) if x.ndim > 1 else x.isfinite()).tolist() == [True, False, True]


def test_strides_do_not_matter() -> None:
    tokens, weight, bias = (x.detach() for x in example(1, (2, 5), 6, torch.float32))
    expected = run([tokens, weight, bias], (2, 5))
    for other in (torch.stack([tokens, tokens], -1)[..., 0], tokens.mT.contiguous().mT):
        actual = run([other, weight.mT.contiguous().mT, torch.stack([bias, bias], -1)[:, 0]], (2, 5))
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("size", "channels"), [((3, 5), 17), ((1, 1), 1), ((4, 8), 16)])
def test_bounds_and_races(size: tuple[int, int], channels: int) -> None:
    with checked_memory():
        run(example(1, size, channels, torch.float32), size)


def test_the_checks_notice_a_map_of_another_size() -> None:
    """One row more than there is."""
    leaves = [x.detach() for x in example(1, (3, 5), 4, torch.float32)]
    with checked_memory(), pytest.raises(Exception, match=r"KernelMemoryError.*load out of bounds"):
        kernel.forward(*leaves, (4, 5), SMALL)


class TestDispatch:
    """The operator takes the kernels where they are preferred, and what is fastest there."""

    def test_untimed_it_is_the_first_tile(self, preferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        for name in ("forward", "backward"):
            function = getattr(kernel, name)
            monkeypatch.setattr(
                kernel, name, lambda *args, function=function: ran.append(args[-1]) or function(*args[:-1], SMALL)
            )
        leaves = example(2, (3, 5), 4, torch.float32)
        actual = output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)
        torch.testing.assert_close(actual, output_and_grads(expected_output(*leaves, (3, 5)), leaves))
        assert ran == [FORWARD_TILES[0], BACKWARD_TILES[0]]

    def test_that_of_torch_is_timed_too(self, preferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
        offered = {}

        def last(problem: str, choices: list, run: object, device: torch.device) -> object:
            offered[problem] = choices
            return choices[-1]

        monkeypatch.setattr(op, "fastest", last)
        for name in ("forward", "backward"):
            monkeypatch.setattr(kernel, name, None)
        leaves = example(2, (3, 5), 4, torch.float32)
        output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)
        sizes = "torch.float32, pixels<2^5, w<2^3, C<2^3"
        assert offered == {
            f"depthwise_gelu forward, {sizes}": [*FORWARD_TILES, "torch"],
            f"depthwise_gelu backward, {sizes}": [*BACKWARD_TILES, "torch"],
        }

    def test_every_choice_is_right(self, preferred: None) -> None:
        leaves = example(1, (3, 5), 4, torch.float32)
        expected = output_and_grads(expected_output(*leaves, (3, 5)), leaves)
        for index in range(3):
            with tuning.fixed(index):
                actual = output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)
            torch.testing.assert_close(actual, expected)

    def test_without_kernels_it_is_plain_torch(self, preferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
        triton_support.disable_triton("depthwise_gelu")
        monkeypatch.setattr(kernel, "forward", None)
        leaves = [x.detach() for x in example(dtype=torch.float32)]
        assert torch.equal(depthwise_gelu(*leaves, (3, 5)), reference.forward(*leaves, (3, 5)))


@pytest.mark.parametrize("autocast", [False, True])
def test_mix_ffn_through_the_kernels(autocast: bool, preferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer computes on a GPU, interpreted: output and all gradients are those of the CPU."""
    ffn, tokens = MixFFN(4, 16), torch.randn(2, 15, 4, requires_grad=True)
    leaves = [tokens, *ffn.parameters()]

    def compute() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = ffn(tokens, (3, 5))
        return output_and_grads(output, leaves)

    expected = compute()
    seen = []

    def activate(self: MixFFN, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        seen.append(hidden.dtype)
        convolution = self.dwconv.dwconv
        return mit.depthwise_gelu(hidden, convolution.weight, convolution.bias, size)

    monkeypatch.setattr(MixFFN, "_activate", activate)
    monkeypatch.setattr(kernel, "forward", functools.partial(_with_small_tile, kernel.forward))
    monkeypatch.setattr(kernel, "backward", functools.partial(_with_small_tile, kernel.backward))
    actual = compute()
    assert seen == 2 * [torch.bfloat16 if autocast else torch.float32]  # backward computes it again
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= (3e-2 if autocast else 1e-5) * y.abs().max()


def _with_small_tile(function: object, *arguments: object) -> object:
    return function(*arguments[:-1], SMALL)
