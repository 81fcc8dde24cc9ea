"""Depthwise convolution + GELU of tokens, by plain torch, against torch's two functions on maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import conv2d, gelu

from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.model import mit
from allspark_fast.model.mit import MixFFN
from bench.harness import saved_bytes
from tests.kernels.forbid_sync import forbid_sync

SIZE = st.tuples(st.integers(1, 6), st.integers(1, 6))


def example(
    batch: int = 2, size: tuple[int, int] = (3, 5), channels: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Tokens, weight, bias."""
    shapes = (batch, size[0] * size[1], channels), (channels, 1, 3, 3), (channels,)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def expected_output(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *size)
    return gelu(conv2d(maps, weight, bias, padding=1, groups=len(bias))).flatten(2).transpose(1, 2)


def output_and_grads(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients weighted by numbers that all dtypes hold."""
    weights = torch.arange(output.numel()).remainder(7).sub(3).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, weights)]


class TestNumbers:
    """Values and gradients."""

    @settings(max_examples=40, deadline=None)
    @given(batch=st.integers(1, 3), size=SIZE, channels=st.integers(1, 6), seed=st.integers(0, 2**31))
    def test_any_size(self, batch: int, size: tuple[int, int], channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        leaves = example(batch, size, channels)
        actual = output_and_grads(depthwise_gelu(*leaves, size), leaves)
        expected = output_and_grads(expected_output(*leaves, size), leaves)
        assert actual[0].is_contiguous()
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize(("batch", "channels"), [(0, 4), (2, 0)])
    def test_nothing(self, batch: int, channels: int) -> None:
        leaves = example(batch, (3, 5), channels)
        output, *grads = output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)
        assert [x.shape for x in (output, *grads)] == [x.shape for x in (leaves[0], *leaves)]
        assert not any(x.any() for x in grads)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_weights_of_another_precision(self, dtype: torch.dtype) -> None:
        """As under autocast."""
        tokens, weight, bias = example(channels=6)
        leaves = [tokens.detach().to(dtype).requires_grad_(), weight.detach().float().requires_grad_(), bias]
        actual = output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = output_and_grads(expected_output(*exact, (3, 5)), exact)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for x, y, like in zip(actual, expected, (tokens.to(dtype), *leaves), strict=True):
            assert x.dtype == like.dtype
            assert (x.double() - y).abs().max() <= tolerance * y.abs().max()

    def test_autocast_changes_nothing(self) -> None:
        tokens, weight, bias = (x.detach().float() for x in example())
        expected = depthwise_gelu(tokens, weight, bias, (3, 5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = depthwise_gelu(tokens, weight, bias, (3, 5))
        assert torch.equal(actual, expected)

    def test_strides_do_not_matter(self) -> None:
        tokens, weight, bias = example()
        expected = output_and_grads(depthwise_gelu(tokens, weight, bias, (3, 5)), [tokens, weight, bias])
        padded = torch.stack([tokens, tokens], -1)[..., 0]
        transposed = weight.mT.contiguous().mT
        for other in (padded, tokens.mT.contiguous().mT):
            actual = output_and_grads(depthwise_gelu(other, transposed, bias, (3, 5)), [tokens, weight, bias])
            torch.testing.assert_close(actual, expected)

    def test_expanded(self) -> None:
        tokens, weight, bias = example(batch=1)
        actual = depthwise_gelu(tokens.expand(3, -1, -1), weight, bias[:1].expand(4), (3, 5))
        expected = expected_output(tokens.expand(3, -1, -1), weight, bias[:1].expand(4), (3, 5))
        leaves = [tokens, weight, bias]
        torch.testing.assert_close(output_and_grads(actual, leaves), output_and_grads(expected, leaves))
        torch.testing.assert_close(
            *(
                torch.autograd.grad(x.sum(), tokens)[0]
                for x in (depthwise_gelu(tokens, weight, bias, (3, 5)), expected_output(tokens, weight, bias, (3, 5)))
            )
        )

    def test_nan_shows_where_it_is_and_around(self) -> None:
        tokens, weight, bias = (x.detach() for x in example(1, (5, 6)))
        tokens[0, 2 * 6 + 1, 3] = torch.nan
        output = depthwise_gelu(tokens, weight, bias, (5, 6)).unflatten(1, (5, 6))
        expected = torch.zeros(1, 5, 6, 4, dtype=torch.bool)
        expected[:, 1:4, 0:3, 3] = True
        assert torch.equal(output.isnan(), expected)


class TestRegistration:
    """Autograd, compile, sync, what is kept."""

    def test_gradcheck(self) -> None:
        leaves = example(2, (2, 3), 2)
        assert torch.autograd.gradcheck(lambda *x: depthwise_gelu(*x, (2, 3)), leaves)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        tokens, weight, bias = example(dtype=dtype)
        ops = torch.ops.allspark_fast
        opcheck(ops.depthwise_gelu.default, (tokens, weight, bias, [3, 5]))
        strided = tokens.detach().mT.contiguous().mT
        for saved in (tokens.detach(), strided):
            arguments = (saved.clone(), saved, weight.detach().float(), bias.detach(), [3, 5])
            opcheck(ops.depthwise_gelu_backward.default, arguments)

    def test_compiles_as_one_graph(self) -> None:
        leaves = example(dtype=torch.float32)
        compiled = torch.compile(depthwise_gelu, fullgraph=True, backend="aot_eager")
        actual = output_and_grads(compiled(*leaves, (3, 5)), leaves)
        torch.testing.assert_close(actual, output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves))

    def test_only_the_arguments_are_kept(self) -> None:
        leaves = example()
        assert saved_bytes(lambda: depthwise_gelu(*leaves, (3, 5)), beyond=leaves) == 0

    def test_waits_for_nothing(self) -> None:
        leaves = example()
        with forbid_sync(inside_operators=True):
            output_and_grads(depthwise_gelu(*leaves, (3, 5)), leaves)

    def test_traces_for_cuda_without_a_gpu(self) -> None:
        with FakeTensorMode(), torch.device("cuda"), forbid_sync():
            tokens, weight, bias = torch.empty(2, 15, 4).bfloat16(), torch.empty(4, 1, 3, 3), torch.empty(4)
            output = depthwise_gelu(tokens, weight, bias, (3, 5))
            # Autograd's engine asks for the device, so backward is traced as the operator that it calls.
            backward = torch.ops.allspark_fast.depthwise_gelu_backward
            grads = backward(output, tokens, weight, bias, [3, 5])
        for x, like in zip((output, *grads), (tokens, tokens, weight, bias), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


class TestMixFFN:
    """Which layers take the operator."""

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_on_cuda_it_is_the_operator(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def counted(*arguments: object) -> Tensor:
            calls.append(arguments)
            return depthwise_gelu(*arguments)

        monkeypatch.setattr(mit, "depthwise_gelu", counted)
        monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # looks at numbers
        with FakeTensorMode(), torch.device(device):
            ffn = MixFFN(4, 16)
            assert ffn(torch.empty(2, 15, 4), (3, 5)).shape == (2, 15, 4)
        assert len(calls) == (device == "cuda")

    def test_what_is_kept_on_cuda(self) -> None:
        """The output of fc1 alone, as on a CPU."""
        with FakeTensorMode(), torch.device("cuda"):
            ffn, tokens = MixFFN(8, 32), torch.empty(2, 15, 8)
            kept = saved_bytes(lambda: ffn(tokens, (3, 5)), beyond=[tokens, *ffn.parameters()])
        assert kept == 4 * 2 * 15 * 32


GOOD = {"tokens": torch.zeros(2, 15, 4), "weight": torch.zeros(4, 1, 3, 3), "bias": torch.zeros(4), "size": (3, 5)}
BAD = {
    "no tensor": ({"tokens": [1.0]}, TypeError, r"tokens must be a tensor of shape \(B, h·w, C\), got list"),
    "tokens dtype": ({"tokens": torch.zeros(2, 15, 4).int()}, TypeError, "tokens must have dtype"),
    "tokens axes": ({"tokens": torch.zeros(2, 4, 3, 5)}, ValueError, r"tokens must have shape \(B, h·w, C\)"),
    "another size": ({"size": (3, 4)}, ValueError, r"tokens must have shape \(B, h·w, C\) = \(2, 12, 4\), got \(2, 15"),
    "empty size": ({"size": (0, 5)}, ValueError, "H of size must be at least 1, got 0"),
    "size of one": ({"size": 15}, TypeError, r"size must be a pair \(H, W\), got 15"),
    "weight axes": ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"weight must have shape \(C, 1, 3, 3\), got \(4, 3"),
    "weight": ({"weight": torch.zeros(4, 1, 5, 5)}, ValueError, r"weight must have shape .* = \(4, 1, 3, 3\)"),
    "weight device": ({"weight": torch.zeros(4, 1, 3, 3, device="meta")}, ValueError, "weight is on meta"),
    "no bias": ({"bias": None}, TypeError, r"bias must be a tensor of shape \(C,\), got NoneType"),
    "bias": ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(C,\) = \(4,\), got \(5,\)"),
    "bias dtype": ({"bias": torch.zeros(4).long()}, TypeError, "bias must have dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        depthwise_gelu(**{**GOOD, **change})
