"""Channel attention: every backend against the materialised reference."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from allspark_fast.kernels.channel_attention import channel_attention, chunked
from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from bench.harness import saved_bytes
from tests.helpers.compare import output_and_grads

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def inputs(batch, heads, tokens, channels, columns, *, shared=True, dtype=torch.float64, mean=0.0):
    key_batch = 1 if shared else batch
    shapes = [(batch, heads, tokens, channels), *[(key_batch, heads, tokens, columns)] * 2]
    return [(torch.randn(shape, dtype=torch.float64) + mean).to(dtype).requires_grad_() for shape in shapes]


def assert_equal_to_reference(tensors, tolerance, **options):
    actual, expected = (
        output_and_grads(functools.partial(channel_attention, **chosen), leaves)
        for chosen, leaves in ((options, tensors), ({**options, "backend": "reference"}, [x.double() for x in tensors]))
    )
    for x, y in zip(actual, expected, strict=True):
        assert x.isfinite().all()
        scale = y.abs().max().clamp(min=1e-2)  # gradients of a single column are zero
        assert (x.double() - y).abs().max() <= tolerance * scale


DEGENERATE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], object]] = {
    "none": lambda *_: None,
    "zero query": lambda query, *_: query.zero_(),
    "zero row": lambda query, *_: query[..., 3].zero_(),
    "constant key": lambda _, key, *__: key.copy_(key[..., :1].clone()),
    "tiny": lambda query, key, *_: (query.mul_(1e-4), key.mul_(1e-2)),
    "huge": lambda query, key, *_: (query.mul_(1e3), key.mul_(1e3)),
    "outliers": lambda _, key, *__: key[..., 5].mul_(100),
    "huge number": lambda _, key, *__: key[..., 3, 11].fill_(1e4),
    "token of another size": lambda _, key, *__: key[:, :, 7].mul_(1e-3).add_(50),
    "small value": lambda _, __, value, ___: value.mul_(1e-3),
    "large gradient": lambda *tensors: tensors[3].mul_(1e4),
    "no gradient": lambda *tensors: tensors[3].zero_(),
}


# Maps of one column have no gradient but rounding, and float32 shows it.
SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "tokens": st.integers(1, 40),
        "channels": st.integers(1, 40),
        "group": st.integers(2, 30),
        "mask": st.lists(st.booleans(), min_size=1, max_size=4),
        "shared": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.3]),
    }
)


def assert_parity_on_shape(shape, dtype, tolerance, backend):
    names = ("batch", "heads", "tokens", "channels")
    columns = shape["group"] * len(shape["mask"])
    tensors = inputs(*(shape[x] for x in names), columns, shared=shape["shared"], dtype=dtype)
    options = {"group_mask": torch.tensor(shape["mask"]), "dropout_p": shape["dropout_p"], "seed": SEED}
    assert_equal_to_reference(tensors, tolerance, backend=backend, **options)


class BackendTests:
    """Inputs at the edge of what is sensible, and registration, for the backend of a derived class."""

    backend: str

    def run(self, tensors, **options):
        return output_and_grads(functools.partial(channel_attention, backend=self.backend, **options), tensors)

    def check(self, tensors, dtype):
        """Half precision to 1e-2 of float64, float32 to 1e-5 or what plain float32 comes to on such inputs."""
        *tensors, grad = (x.to(dtype) for x in tensors)

        def run(dtype, backend):
            leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
            output = channel_attention(*leaves, dropout_p=0.1, seed=SEED, backend=backend)
            return [x.double() for x in (output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype)))]

        expected, plain = run(torch.float64, "reference"), run(dtype, "reference")
        for x, y, z in zip(run(dtype, self.backend), expected, plain, strict=True):
            scale = y.abs().max().clamp(min=1e-5)
            tolerance = max(1e-5 * scale, 2 * (z - y).abs().max()) if dtype == torch.float32 else 1e-2 * scale
            assert (x - y).abs().max() <= tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [64, pytest.param(289, marks=pytest.mark.slow)])
    def test_saturated_maps(self, tokens, dtype):
        """Queries that are noisy copies of keys: each row attends to one key, and gradients are what it leaves."""
        key, value = (torch.randn(1, 1, tokens, 320) for _ in range(2))
        query = torch.stack([key[0][..., torch.randint(320, (24,))] for _ in range(2)])
        query += 0.3 * torch.randn_like(query)
        self.check([query, key, value, torch.randn_like(query)], dtype)

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            *((kind, torch.bfloat16) for kind in DEGENERATE),
            *((kind, torch.float16) for kind in ("none", "small value", "large gradient", "no gradient")),
            *(pytest.param(kind, torch.float32, marks=pytest.mark.slow) for kind in DEGENERATE),
        ],
    )
    def test_degenerate_inputs(self, kind, dtype):
        tensors = [torch.randn(x, 1, 32, y) for x, y in ((2, 24), (1, 96), (1, 96), (2, 24))]
        DEGENERATE[kind](*tensors)
        self.check(tensors, dtype)

    @pytest.mark.parametrize("shared", [True, False])
    def test_empty_batch(self, shared):
        tensors = inputs(0, 2, 9, 5, 7, shared=shared, dtype=torch.float32)
        for result, x in zip(self.run(tensors), [tensors[0], *tensors], strict=True):
            assert torch.equal(result, torch.zeros_like(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_all_groups_masked_gives_zeros_and_zero_gradients(self, dtype):
        tensors = inputs(2, 1, 20, 5, 300, dtype=dtype)
        for x in self.run(tensors, group_mask=torch.zeros(3, dtype=torch.bool)):
            assert torch.equal(x, torch.zeros_like(x))

    @pytest.mark.parametrize("mean", [10.0, 100.0])
    def test_large_means(self, mean):
        """The mean is a shift that the norm takes out: the error is that of the inputs, relative to their spread."""
        tensors = inputs(2, 1, 25, 17, 57, dtype=torch.float32, mean=mean)
        assert_equal_to_reference(tensors, 1e-5 * mean, backend=self.backend)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_non_finite_inputs_show(self, which, bad):
        tensors = [x.detach() for x in inputs(1, 1, 9, 5, 7, dtype=torch.float32)]
        tensors[which][0, 0, 0, 0] = bad
        assert not channel_attention(*tensors, backend=self.backend).isfinite().all()

    @pytest.mark.parametrize("strides", ["tokens last", "padded", "heads inside", "expanded"])
    def test_strides(self, strides):
        layout = {
            "tokens last": lambda x: x.mT.contiguous().mT,
            "padded": lambda x: F.pad(x, (1, 2))[..., 1:-2],
            "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "expanded": lambda x: x[:1, :1].expand(2, 3, -1, -1),
        }[strides]
        tensors = [layout(x.detach()) for x in inputs(2, 3, 9, 5, 7, shared=False, dtype=torch.float32)]
        expected = channel_attention(*(x.contiguous() for x in tensors), backend="reference")
        torch.testing.assert_close(channel_attention(*tensors, backend=self.backend), expected)


class TestAgainstTheDefinition:
    """The reference itself, against instance_norm and softmax of torch."""

    @pytest.mark.parametrize(("scale", "eps"), [(1, 1e-5), (1e-2, 1e-3)])
    def test_published_formula(self, scale, eps):
        """With masked groups, which are as if absent, and an eps that counts for small inputs."""
        query, key, value = (x.detach() * scale for x in inputs(2, 3, 7, 5, 12, shared=False))
        mask = torch.tensor([True, False, True, False])
        kept = mask.repeat_interleave(3)
        expected = (F.instance_norm(query.mT @ key[..., kept], eps=eps).softmax(-1) @ value[..., kept].mT).mT
        for backend in ("reference", "chunked"):
            actual = channel_attention(query, key, value, group_mask=mask, eps=eps, backend=backend)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    def test_dropout_keeps_the_mean(self):
        query, key, _ = inputs(1, 1, 5, 64, 512)
        ones = torch.ones(1, 1, 5, 512, dtype=torch.float64)
        output = channel_attention(query, key, ones, dropout_p=0.25, seed=SEED)
        assert output.std() > 0
        assert output.mean().item() == pytest.approx(1, abs=0.02)


class TestBackends:
    @settings(max_examples=40, deadline=None)
    @given(SHAPES)
    def test_chunked_on_any_shape(self, shape):
        assert_parity_on_shape(shape, torch.float64, 1e-9, "chunked")

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_chunked_over_several_blocks_and_chunks(self, shared, dropout_p, monkeypatch):
        monkeypatch.setattr(chunked, "BLOCK_ROWS", 4)  # and half of it in backward
        monkeypatch.setattr(chunked, "CHUNK", 20)
        tensors = inputs(2, 2, 9, 5, 75, shared=shared, dtype=torch.float32)
        mask = torch.tensor([True, True, False, True, True])
        assert_equal_to_reference(tensors, 1e-5, group_mask=mask, dropout_p=dropout_p, seed=SEED)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_reference_in_half_precision(self, dtype):
        assert_equal_to_reference(inputs(2, 1, 25, 16, 64, dtype=dtype), 1e-2, backend="reference")

    def test_a_variance_that_rounds_below_zero(self):
        """Large equal queries and keys at right angles to them: the variance of a map of zeros is a difference."""
        direction = F.normalize(torch.randn(20, 9, 1), dim=1)
        key = torch.randn(20, 9, 50)
        key -= direction @ (direction.mT @ key)
        query = (1000 * direction).expand(-1, -1, 5)
        assert channel_attention(query[:, None], key[:, None], key[:, None]).isfinite().all()


class TestChunked(BackendTests):
    backend = "chunked"


class TestDropoutMask:
    def test_pinned_bits(self):
        """The mask is a public contract: kernels, other versions and resumed runs must see the same."""
        keep = keep_mask(*hash_keys(SEED, 2, 1, 3, 8), 0.5)
        bits = ["".join(map(str, row.int().tolist())) for row in keep.flatten(0, 2)]
        assert bits == ["01001111", "10110011", "01010110", "01111101", "10100101", "10100101"]

    def test_rate_and_independence(self):
        keep = keep_mask(*hash_keys(SEED, 1, 2, 256, 2048), 0.1).double() - 0.9
        sigma = math.sqrt(0.09)
        assert abs(keep.mean()) < 5 * sigma / math.sqrt(keep.numel())
        for axis in (-1, -2):
            deviation = keep.mean(axis).std().item()
            assert deviation == pytest.approx(sigma / math.sqrt(keep.shape[axis]), rel=0.15)
        rows = keep.flatten(0, 2)
        correlation = (rows @ rows.mT / rows.shape[1] / 0.09).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / math.sqrt(rows.shape[1])

    def test_drawn_from_the_torch_generator_without_a_seed(self):
        tensors = [x.detach() for x in inputs(1, 1, 5, 4, 32)]
        torch.manual_seed(3)
        first, second = (channel_attention(*tensors, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(channel_attention(*tensors, dropout_p=0.5), first)
        assert not torch.equal(first, second)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kept_at_pascal_size(self, dtype):
        """The inputs, and two numbers a row: B=2, N=289, C=512, H=2, K=21."""
        with FakeTensorMode():
            shapes = [(2, 1, 289, 1024), *[(1, 1, 289, 21 * 1024)] * 2]
            tensors = [torch.empty(x, dtype=dtype, requires_grad=True) for x in shapes]
            seed = torch.empty((), dtype=torch.int64)
            kept = saved_bytes(lambda: channel_attention(*tensors, dropout_p=0.1, seed=seed))
        assert kept == sum(x.nbytes for x in tensors) + 2 * 2 * 1024 * 4 + seed.nbytes
