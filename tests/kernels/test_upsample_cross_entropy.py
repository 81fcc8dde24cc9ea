"""Upsampling + cross-entropy against torch's two functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import cross_entropy, interpolate

from allspark_fast.kernels.bilinear import BAND_BYTES
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from bench.harness import peak_bytes, saved_bytes
from tests.helpers.forbid_sync import forbid_sync


def example(
    batch: int = 2, classes: int = 5, small: tuple[int, int] = (4, 6), large: tuple[int, int] = (13, 17)
) -> tuple[Tensor, Tensor]:
    logits = torch.randn(batch, classes, *small, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, (batch, *large))
    return logits, target.where(torch.rand(target.shape) > 0.2, 255)


def expected_loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    full = interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return cross_entropy(full, target, ignore_index=255, reduction=reduction)


class TestLoss:
    """Values and gradients."""

    @settings(max_examples=40, deadline=None)
    @given(
        batch=st.integers(1, 3),
        classes=st.integers(1, 6),
        small=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        large=st.tuples(st.integers(1, 19), st.integers(1, 19)),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        seed=st.integers(0, 2**31),
    )
    def test_any_size(
        self,
        batch: int,
        classes: int,
        small: tuple[int, int],
        large: tuple[int, int],
        reduction: str,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        logits, target = example(batch, classes, small, large)
        target[0, 0, 0] = 0
        loss, expected = (
            upsample_cross_entropy(logits, target, reduction=reduction),
            expected_loss(logits, target, reduction),
        )
        torch.testing.assert_close(loss, expected)
        weight = torch.rand_like(loss)
        grads = [torch.autograd.grad((x * weight).sum(), logits)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("classes", [2, 171])
    def test_class_counts_of_real_data(self, classes: int) -> None:
        logits, target = example(classes=classes)
        torch.testing.assert_close(upsample_cross_entropy(logits, target), expected_loss(logits, target))

    def test_all_ignored_gives_zero_and_zero_gradients(self) -> None:
        logits, target = example()
        for options in ({}, {"ohem_threshold": 0.7, "ohem_min_kept": 10}):
            loss = upsample_cross_entropy(logits, torch.full_like(target, 255), **options)
            assert loss.item() == 0
            (grad,) = torch.autograd.grad(loss, logits)
            assert torch.equal(grad, torch.zeros_like(grad))

    def test_another_ignore_index(self) -> None:
        logits, target = example()
        renamed = target.where(target != 255, -1)
        assert torch.equal(
            upsample_cross_entropy(logits, target), upsample_cross_entropy(logits, renamed, ignore_index=-1)
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        logits, target = example()
        half = logits.detach().to(dtype).requires_grad_()
        loss = upsample_cross_entropy(half, target)
        assert loss.dtype == torch.float32
        expected = expected_loss(half.detach().float(), target)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert half.grad.dtype == dtype

    def test_nan_shows(self) -> None:
        logits, target = example()
        with torch.no_grad():
            logits[0, 1, 2, 3] = math.nan
        assert upsample_cross_entropy(logits, target).isnan()

    def test_strides_do_not_matter(self) -> None:
        logits, target = example()
        expected = upsample_cross_entropy(logits, target)
        (expected_grad,) = torch.autograd.grad(expected, logits)
        for other in (logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
            leaf = other.detach().requires_grad_()
            loss = upsample_cross_entropy(leaf, target.mT.contiguous().mT)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert torch.equal(loss, expected)
            assert torch.equal(grad, expected_grad)
            assert grad.stride() == leaf.stride()

    def test_expanded_logits(self) -> None:
        logits, target = example(batch=1)
        target = target.expand(3, -1, -1)
        loss = upsample_cross_entropy(logits.expand(3, -1, -1, -1), target)
        torch.testing.assert_close(loss, expected_loss(logits, target[:1]))
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logits)[0] for x in (loss, expected_loss(logits, target[:1])))
        )

    def test_float32_is_as_exact_as_the_reference(self) -> None:
        """Several bands, in float32, against float64."""
        logits, target = example(classes=19, small=(17, 33), large=(65, 129))
        weight = torch.rand(target.shape)
        single = logits.detach().float().requires_grad_()
        loss = upsample_cross_entropy(single, target, reduction="none")
        expected = expected_loss(single.double(), target, "none")
        assert (loss - expected).abs().max() <= 1e-5 * expected.max()
        (grad,) = torch.autograd.grad((loss * weight).sum(), single)
        (expected_grad,) = torch.autograd.grad((expected * weight).sum(), single)
        assert (grad - expected_grad).abs().max() <= 1e-5 * expected_grad.abs().max()

    def test_memory_is_bounded(self) -> None:
        """What is kept, and what a step needs at once: per pixel whatever the classes, besides the logits and bands."""
        target = torch.randint(40, (2, 257, 257))
        logits = torch.randn(2, 40, 65, 65, requires_grad=True)
        kept = target.nbytes + logits.nbytes + target.numel() * 4
        assert saved_bytes(lambda: upsample_cross_entropy(logits, target)) <= kept + 100
        peak = peak_bytes(lambda: upsample_cross_entropy(logits, target).backward())
        # Loss and log-sum-exp, the gradient of the loss, masks; two gradients of the logits; a band and its softmax.
        assert peak <= target.numel() * 24 + 3 * logits.nbytes + 5 * BAND_BYTES
        assert peak < target.numel() * 40 * 4 / 2  # half of the logits at full resolution

    def test_nan_stays_where_it_is(self) -> None:
        logits, target = example(small=(4, 6), large=(8, 12))
        with torch.no_grad():
            logits[0, 1, 0, 0] = math.nan
        loss = upsample_cross_entropy(logits, target.where(target != 255, 0), reduction="none")
        assert torch.equal(loss.isnan(), expected_loss(logits, target.where(target != 255, 0), "none").isnan())


class TestHardExamples:
    """Online hard example mining."""

    def probabilities(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.exp(-expected_loss(logits, target, "none")).masked_fill(target == 255, 2)

    @pytest.mark.parametrize("min_kept", [1, 30, 300])
    @pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
    def test_kept_pixels(self, threshold: float, min_kept: int) -> None:
        logits, target = example()
        probability = self.probabilities(logits, target)
        kth = probability.flatten().sort().values[min_kept - 1]
        kept = probability <= max(threshold, kth.item())
        expected = expected_loss(logits, target, "none")[kept].mean()
        actual = upsample_cross_entropy(logits, target, ohem_threshold=threshold, ohem_min_kept=min_kept)
        torch.testing.assert_close(actual, expected)

    def test_all_count_if_fewer_are_valid_than_must_be_kept(self) -> None:
        logits, target = example()
        actual = upsample_cross_entropy(logits, target, ohem_threshold=0.0, ohem_min_kept=target.numel())
        torch.testing.assert_close(actual, expected_loss(logits, target))

    def test_none_keeps_the_places(self) -> None:
        logits, target = example()
        options = {"ohem_threshold": 0.1, "ohem_min_kept": 20}
        pixels = upsample_cross_entropy(logits, target, reduction="none", **options)
        mean = upsample_cross_entropy(logits, target, **options)
        torch.testing.assert_close(pixels.sum() / (pixels > 0).sum(), mean)

    def test_gradcheck(self) -> None:
        logits, target = example(small=(2, 3), large=(5, 7))

        def loss(x: Tensor) -> Tensor:
            return upsample_cross_entropy(x, target, ohem_threshold=0.2, ohem_min_kept=5)

        assert torch.autograd.gradcheck(loss, (logits,))


class TestRegistration:
    """Autograd, compile and sync."""

    def test_gradcheck(self) -> None:
        logits, target = example(small=(2, 3), large=(5, 7))
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(
                lambda x, how=reduction: upsample_cross_entropy(x, target, reduction=how), (logits,)
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        logits, target = example()
        logits = logits.detach().to(dtype).requires_grad_()
        ops = torch.ops.allspark_fast
        opcheck(ops.upsample_cross_entropy.default, (logits, target, 255))
        grad, lse = torch.rand(target.shape), torch.rand(target.shape) + 9
        for saved in (logits.detach(), logits.detach().contiguous(memory_format=torch.channels_last)):
            opcheck(ops.upsample_cross_entropy_backward.default, (grad, saved, target, lse, 255))

    def test_compiles_as_one_graph(self) -> None:
        logits, target = example()
        compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
        options = {"ohem_threshold": 0.3, "ohem_min_kept": 9}
        torch.testing.assert_close(
            compiled(logits, target, **options), upsample_cross_entropy(logits, target, **options)
        )

    def test_mining_does_not_wait_for_the_device(self) -> None:
        from allspark_fast.kernels.upsample_cross_entropy.op import _hard_examples  # noqa: PLC0415

        with forbid_sync():
            _hard_examples(torch.rand(2, 5, 7), torch.rand(2, 5, 7) > 0.5, 0.7, 9)

    def test_second_backward_is_a_clear_error(self) -> None:
        loss = upsample_cross_entropy(*example())
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


GOOD = {"logits": torch.zeros(2, 3, 4, 5), "target": torch.zeros(2, 7, 9, dtype=torch.int64)}
BAD = {
    "logits dtype": ({"logits": torch.zeros(2, 3, 4, 5).int()}, TypeError, "logits must have dtype"),
    "logits axes": ({"logits": torch.zeros(3, 4, 5)}, ValueError, r"logits must have shape \(B, K, h, w\)"),
    "no classes": ({"logits": torch.zeros(2, 0, 4, 5)}, ValueError, "logits has K = 0"),
    "target dtype": ({"target": torch.zeros(2, 7, 9)}, TypeError, "target must have dtype int64"),
    "target batch": ({"target": torch.zeros(1, 7, 9).long()}, ValueError, r"target must have shape .* \(2, 7, 9\)"),
    "empty target": ({"target": torch.zeros(2, 0, 9).long()}, ValueError, "target has H = 0"),
    "target device": ({"target": torch.zeros(2, 7, 9, device="meta").long()}, ValueError, "target is on meta"),
    "class too large": ({"target": torch.full((2, 7, 9), 3)}, ValueError, r"target holds class 3, expected \[0, 3\)"),
    "negative class": ({"target": torch.full((2, 7, 9), -1)}, ValueError, "target holds class -1"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
    "ignore_index": ({"ignore_index": "255"}, TypeError, "ignore_index must be an integer, got '255'"),
    "ignore_index of 1.5": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    "ignore_index too large": ({"ignore_index": 2**63}, ValueError, "ignore_index must be in"),
    "min_kept of 1.5": ({"ohem_threshold": 0.5, "ohem_min_kept": 1.5}, TypeError, "ohem_min_kept must be an integer"),
    "threshold type": ({"ohem_threshold": "0.5"}, TypeError, "ohem_threshold must be a number"),
    "threshold": ({"ohem_threshold": 1.5}, ValueError, "ohem_threshold must be a probability"),
    "min_kept": ({"ohem_threshold": 0.5, "ohem_min_kept": -1}, ValueError, "ohem_min_kept must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**{**GOOD, **change})
