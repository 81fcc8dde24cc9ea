"""Depthwise convolution + GELU of tokens against torch's two functions on maps."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, gelu

from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from bench.harness import saved_bytes
from tests.helpers.compare import TOLERANCE, assert_close, output_and_grads, strided
from tests.helpers.kernels import MOSTLY_TORCH, use_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def example(batch=2, size=(3, 5), channels=4, dtype=torch.float32):
    """Tokens, weight, bias."""
    shapes = (batch, size[0] * size[1], channels), (channels, 1, 3, 3), (channels,)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def plain(tokens, weight, bias, size):
    """By torch's convolution and GELU of maps."""
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *size)
    return gelu(conv2d(maps, weight, bias, padding=1, groups=len(bias))).flatten(2).transpose(1, 2)


def assert_right(inputs, size):
    actual = output_and_grads(functools.partial(depthwise_gelu, size=size), inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in (inputs[0], *inputs)]
    assert all(x.is_contiguous() for x in actual)
    expected = output_and_grads(functools.partial(plain, size=size), [x.double() for x in inputs])
    assert_close(actual, expected, max(TOLERANCE[x.dtype] for x in inputs))


class TestNumbers:
    @settings(max_examples=20, deadline=None)
    @given(
        kernels=MOSTLY_TORCH,
        sizes=st.tuples(st.integers(1, 2), st.tuples(st.integers(1, 5), st.integers(1, 9)), st.integers(1, 20)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    )
    def test_any_size(self, kernels, sizes, dtype, seed):
        torch.manual_seed(seed)
        with use_kernels(kernels):
            assert_right(example(*sizes, dtype), sizes[1])

    # A tile has 16 rows, 8 columns and 64 channels.
    @pytest.mark.parametrize(
        ("size", "channels"), [((1, 1), 1), ((1, 9), 3), ((17, 1), 3), ((16, 8), 64), ((18, 9), 65)]
    )
    def test_edges_of_maps_and_tiles(self, kernels, size, channels):
        assert_right(example(1, size, channels), size)

    @pytest.mark.parametrize(("batch", "channels"), [(0, 4), (2, 0)])
    def test_empty(self, kernels, batch, channels):
        inputs = example(batch, channels=channels)
        output, *grads = output_and_grads(functools.partial(depthwise_gelu, size=(3, 5)), inputs)
        assert [x.shape for x in (output, *grads)] == [x.shape for x in (inputs[0], *inputs)]
        assert not any(x.any() for x in grads)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights_of_another_precision(self, kernels, dtype):
        """As under autocast."""
        tokens, weight, bias = example(1, channels=6)
        assert_right([tokens.to(dtype), weight, bias.half()], (3, 5))
        assert_right([tokens, weight.to(dtype), bias.to(dtype)], (3, 5))

    def test_any_strides(self, kernels):
        function = functools.partial(depthwise_gelu, size=(3, 5))
        tokens, weight, bias = example()
        expected = output_and_grads(function, [tokens, weight, bias])
        for other, other_weight in zip(strided(tokens), strided(weight), strict=True):
            assert_close(output_and_grads(function, [other, other_weight, strided(bias[None])[1][0]]), expected, 1e-6)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_numbers_stay_under_their_window(self, kernels, bad):
        inputs = example(1, (5, 6))
        inputs[0][0, 2 * 6 + 1, 3] = bad
        function = functools.partial(depthwise_gelu, size=(5, 6))
        output, grad_tokens, grad_weight, grad_bias = output_and_grads(function, inputs)
        reached = torch.zeros(1, 5, 6, 4, dtype=torch.bool)
        reached[:, 1:4, 0:3, 3] = True
        output = output.unflatten(1, (5, 6))
        assert output[~reached].isfinite().all()
        assert not output[reached].isfinite().all()
        assert not grad_tokens.isfinite().all()
        for grad in (grad_weight.flatten(1).sum(1), grad_bias):
            assert grad.isfinite().tolist() == [True, True, True, False]

    @pytest.mark.parametrize("kernels", ["triton"], indirect=True)
    def test_gelu_of_small_and_large_numbers(self, kernels):
        """By the center of the window alone; the error of torch's GELU in float32 is 4e-7."""
        weight, bias = torch.zeros(64, 1, 3, 3), torch.zeros(64)
        weight[..., 1, 1] = 1
        x = torch.linspace(-14, 14, 16 * 8 * 64).view(1, 16 * 8, 64).requires_grad_()
        far = torch.tensor([-3e38, -1e20, -100.0, -0.0, 100.0, 1e20, 3e38]).repeat_interleave(64).view(1, 7, 64)
        far.requires_grad_()
        output, far_output = depthwise_gelu(x, weight, bias, (16, 8)), depthwise_gelu(far, weight, bias, (1, 7))
        slope, far_slope = torch.autograd.grad([output.sum(), far_output.sum()], [x, far])
        wide = x.detach().double().requires_grad_()
        exact = gelu(wide)
        assert (output - exact).abs().max() <= 3e-7
        assert (slope - torch.autograd.grad(exact.sum(), wide)[0]).abs().max() <= 5e-7
        assert torch.equal(far_output, far.clamp(min=0))
        assert far_slope[0, :, 0].tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]

    @pytest.mark.parametrize("kernels", ["triton"], indirect=True)
    def test_the_interpreter_notices_a_map_of_another_size(self, kernels):
        """The fixture checks the bounds of every access: here a map has one row fewer than the kernel is told."""
        from allspark_fast.kernels.depthwise_gelu import kernel  # noqa: PLC0415 needs triton

        with pytest.raises(Exception, match=r"KernelMemoryError.*load out of bounds"):
            kernel.forward(*example(1), (4, 5))

    def test_only_the_arguments_are_saved(self):
        inputs = [x.requires_grad_() for x in example()]
        assert saved_bytes(lambda: depthwise_gelu(*inputs, (3, 5)), beyond=inputs) == 0
