"""Upsampling with cross-entropy, or argmax, against torch's two functions."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import reference, upsample_cross_entropy
from allspark_fast.kernels.upsample_cross_entropy.chunked import BAND_BYTES
from bench.harness import peak_bytes, saved_bytes
from tests.helpers.compare import TOLERANCE, assert_close, output_and_grads, strided
from tests.helpers.kernels import MOSTLY_TORCH, use_kernels


def example(batch=2, classes=5, small=(3, 5), large=(7, 9), dtype=torch.float32):
    """Logits, and a target with ignored pixels."""
    target = torch.randint(classes, (batch, *large))
    return torch.randn(batch, classes, *small).to(dtype), target.where(torch.rand(target.shape) > 0.2, 255)


def plain_loss(logits, target, reduction="mean"):
    pixels = reference.forward(logits, target, 255)
    return pixels if reduction == "none" else pixels.sum() / ((target != 255).sum() if reduction == "mean" else 1)


def assert_right(logits, target, reduction="none"):
    """Loss and gradient against float64."""
    actual = output_and_grads(functools.partial(upsample_cross_entropy, target=target, reduction=reduction), [logits])
    expected = output_and_grads(functools.partial(plain_loss, target=target, reduction=reduction), [logits.double()])
    assert actual[0].dtype == torch.promote_types(logits.dtype, torch.float32)
    assert actual[1].dtype == logits.dtype
    assert actual[1].stride() == torch.empty_like(logits).stride()
    assert_close(actual[:1], expected[:1])
    assert_close(actual[1:], expected[1:], 5 * TOLERANCE[logits.dtype] if logits.dtype.itemsize == 2 else None)


class TestLoss:
    @settings(max_examples=40, deadline=None)
    @given(
        kernels=MOSTLY_TORCH,
        sizes=st.tuples(
            st.integers(1, 2),
            st.integers(1, 10),
            st.tuples(st.integers(1, 4), st.integers(1, 5)),
            st.tuples(st.integers(1, 6), st.integers(1, 9)),
        ),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        seed=st.integers(0, 2**31),
    )
    def test_any_size(self, kernels, sizes, reduction, seed):
        torch.manual_seed(seed)
        logits, target = example(*sizes)
        target[0, 0, 0] = 0
        with use_kernels(kernels):
            assert_right(logits, target, reduction)

    @pytest.mark.parametrize(
        "sizes",
        [
            {"batch": 0},
            {"classes": 1, "small": (1, 2), "large": (2, 3)},
            {"classes": 171, "small": (1, 2), "large": (2, 3)},
            {"classes": 3, "small": (2, 40), "large": (3, 150)},  # several blocks of pixels and of cells
            {"classes": 11, "small": (6, 14), "large": (4, 9)},  # downsampling
            {"dtype": torch.float16},
            {"dtype": torch.bfloat16},
        ],
    )
    def test_edges(self, kernels, sizes):
        assert_right(*example(**{"batch": 1, **sizes}))

    def test_large_logits_neither_overflow_nor_round(self, kernels):
        logits, target = example()
        assert_right(logits * 1e4, target)

    def test_float32_in_several_bands(self):
        assert_right(*example(classes=19, small=(17, 33), large=(65, 129)))

    @pytest.mark.parametrize("options", [{}, {"ohem_threshold": 0.7, "ohem_min_kept": 10}])
    def test_all_ignored_gives_zero_and_zero_gradients(self, kernels, options):
        logits, target = example()
        loss, grad = output_and_grads(lambda x: upsample_cross_entropy(x, target.fill_(255), **options), [logits])
        assert loss.item() == 0
        assert not grad.any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite_logits_show_where_they_are(self, kernels, bad):
        logits, target = example(small=(3, 5), large=(6, 10))
        logits[0, 1, 0, 0] = bad
        target = target.where(target != 255, 0)
        loss = upsample_cross_entropy(logits, target, reduction="none")
        assert torch.equal(loss.isfinite(), plain_loss(logits, target, "none").isfinite())
        assert not upsample_cross_entropy(logits, target).isfinite()
        assert not upsample_cross_entropy(logits, target, ohem_threshold=0.7, ohem_min_kept=10).isfinite()

    @pytest.mark.parametrize("wrong", [-1, 5])
    @pytest.mark.parametrize("kernels", ["triton"], indirect=True)
    def test_the_kernel_marks_a_target_that_is_no_class(self, kernels, wrong):
        """On a GPU; on the CPU such targets are refused."""
        from allspark_fast.kernels.upsample_cross_entropy import kernel  # noqa: PLC0415 needs triton

        logits, target = example()
        target[1, 4, 6] = wrong
        loss, lse = kernel.forward(logits, target, 255)
        assert loss.isnan().nonzero().tolist() == [[1, 4, 6]]
        assert kernel.backward(torch.rand(target.shape), logits, target, lse, 255)[1].isnan().any()

    def test_any_strides(self, kernels):
        logits, target = example(1)
        function = functools.partial(upsample_cross_entropy, target=strided(target)[0], reduction="none")
        expected = output_and_grads(function, [logits])
        for other in (logits.contiguous(memory_format=torch.channels_last), *strided(logits)):
            actual = output_and_grads(function, [other])
            assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))

    def test_memory_is_bounded(self):
        """What is saved, and the peak of a step: per pixel for any number of classes, besides logits and bands."""
        target = torch.randint(40, (2, 257, 257))
        logits = torch.randn(2, 40, 65, 65, requires_grad=True)
        kept = target.nbytes + logits.nbytes + target.numel() * 4
        assert saved_bytes(lambda: upsample_cross_entropy(logits, target)) <= kept + 100
        peak = peak_bytes(lambda: upsample_cross_entropy(logits, target).backward())
        # Loss and log-sum-exp, the gradient of the loss, masks; two gradients of the logits; a band and its softmax.
        assert peak <= target.numel() * 24 + 3 * logits.nbytes + 5 * BAND_BYTES
        assert peak < target.numel() * 40 * 4 / 2  # half of the logits at full resolution

    @pytest.mark.parametrize("min_kept", [1, 30, 300, 440])
    @pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
    def test_hard_examples(self, threshold, min_kept):
        """All valid pixels count if they are fewer than must be kept."""
        logits, target = example(large=(13, 17))
        pixels = plain_loss(logits, target, "none")
        probability = torch.exp(-pixels).masked_fill(target == 255, 2)
        kth = probability.flatten().sort().values[min_kept - 1]
        kept = (probability <= max(threshold, kth.item())) & (target != 255)
        for reduction, expected in (("mean", pixels[kept].mean()), ("none", pixels * kept)):
            actual = upsample_cross_entropy(
                logits, target, reduction=reduction, ohem_threshold=threshold, ohem_min_kept=min_kept
            )
            torch.testing.assert_close(actual, expected)


class TestArgmax:
    @settings(max_examples=40, deadline=None)
    @given(
        kernels=MOSTLY_TORCH,
        sizes=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
        size=st.tuples(st.integers(1, 13), st.integers(1, 19)),
        seed=st.integers(0, 2**31),
    )
    def test_any_size(self, kernels, sizes, size, seed):
        torch.manual_seed(seed)
        logits = torch.randn(sizes)
        with use_kernels(kernels):
            labels, confidence = upsample_argmax(logits, size)
        assert labels.shape == confidence.shape == (len(logits), *size)
        if len(logits):
            probability = interpolate(logits.double(), size, mode="bilinear", align_corners=False).softmax(1)
            assert_close([confidence, probability.gather(1, labels[:, None])[:, 0].float()], 2 * [probability.amax(1)])

    @pytest.mark.parametrize("classes", [4, 20, 171])
    def test_the_first_maximum_wins(self, kernels, classes):
        logits = torch.zeros(1, classes, 2, 2)
        labels, confidence = upsample_argmax(logits, (3, 3))
        assert (labels == 0).all()
        torch.testing.assert_close(confidence, torch.full((1, 3, 3), 1 / classes))
        logits[:, [1, 3, classes - 1]] = 1
        assert (upsample_argmax(logits, (3, 3))[0] == 1).all()

    @pytest.mark.parametrize("classes", [2, 19, 171])
    def test_equals_the_reference_in_several_bands(self, classes):
        logits = torch.randn(2, classes, 17, 33, dtype=torch.float64)
        expected = reference.upsample_argmax(logits, (65, 129))
        labels, confidence = upsample_argmax(logits.contiguous(memory_format=torch.channels_last), (65, 129))
        assert torch.equal(labels, expected[0])
        assert_close([confidence], expected[1:])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes_and_strides(self, kernels, dtype):
        """Half precision is computed in float32; rows are longer than a block of pixels."""
        logits = torch.randn(1, 20, 2, 30).to(dtype)
        expected = reference.upsample_argmax(logits.double(), (3, 130))
        for other in (logits, *strided(logits)):
            labels, confidence = upsample_argmax(other, (3, 130))
            assert torch.equal(labels, expected[0])
            assert confidence.dtype == torch.promote_types(dtype, torch.float32)
            assert_close([confidence], expected[1:])

    @pytest.mark.parametrize("classes", [5, 40])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite_logits(self, kernels, bad, classes):
        logits = torch.randn(1, classes, 3, 3)
        logits[0, [2, 4], 0, 0] = bad
        labels, confidence = upsample_argmax(logits, (6, 6))
        expected = reference.upsample_argmax(logits, (6, 6))
        assert torch.equal(labels, expected[0])
        assert labels[0, 0, 0] == 2
        assert confidence[0, 0, 0].isnan()
        assert_close([confidence], expected[1:])

    def test_memory_is_bounded(self):
        logits = torch.randn(2, 40, 65, 65)
        results = 2 * 257 * 257 * 12
        peak = peak_bytes(lambda: upsample_argmax(logits, (257, 257)))
        assert peak <= results + logits.nbytes + 5 * BAND_BYTES
        assert peak < 2 * 257 * 257 * 40 * 4 / 2  # half of the logits at full resolution
