"""All operators with the arguments of one table, and any value in place of any of them.

Any value gives the documented error, which names the argument, or the result of dense copies in float64. That those
are right is shown by the tests of each operator.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import normalize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from tests.helpers.forbid_sync import forbid_sync

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
    torch.bool, torch.uint8, torch.int32, torch.int64,
]  # fmt: skip
NO_TENSORS = st.sampled_from([
    None, True, 0, 1, -1, 3, 255, 2**40, 2**63, 0.5, -0.0, 1.5, math.nan, math.inf, "1", "auto", "chunked", "reference",
    "triton", "sdpa", "mean", "none", b"mean", [], [1.0], (2, 3), (2, -3), (2.0, 3), ("2", 3), (1, 2, 3), {}, object(),
    np.float32(0.5), np.int64(2), np.ones((2, 1, 5, 4), np.float32), torch.Size((4, 5)),
])  # fmt: skip

DIFFERENTIABLE = {"query", "key", "value", "logits", "tokens", "weight", "bias"}
CHANGES = ["shape", "axes", "dtype", "layout", "device", "strides", "strides", "strides", "gradient", "gradient"]


def similarity_reached(features, class_map):
    """Cosine similarity of every channel with its class: of classes that are equally similar any is right."""
    channel_class = channel_semantic_grouping(features, class_map)
    similarity = normalize(class_map.double(), dim=2) @ normalize(features.double(), dim=1)
    return similarity.gather(1, channel_class[:, None])


def enqueued(**arguments):
    semantic_memory_enqueue(**arguments)
    return arguments["queue"], arguments["queue_ptr"]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Public functions, and arguments that they take.
OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "channel_attention": (
        channel_attention,
        {
            "query": random(2, 1, 5, 4), "key": random(1, 1, 5, 6), "value": random(1, 1, 5, 6),
            "group_mask": torch.tensor([True, False, True]), "eps": 1e-5, "dropout_p": 0.25, "seed": torch.tensor(3),
            "backend": "chunked",
        },
    ),
    "channel_semantic_grouping": (similarity_reached, {"features": random(2, 5, 6), "class_map": random(2, 3, 5)}),
    "semantic_memory_enqueue": (
        enqueued,
        {
            "queue": random(3, 4, 5), "queue_ptr": torch.tensor([0, 2, 3]), "features": random(2, 5, 6),
            "channel_class": torch.tensor([[0, 1, -1, 2, 2, 0], [1, 1, 1, 7, 1, 1]]),
        },
    ),
    "upsample_cross_entropy": (
        upsample_cross_entropy,
        {
            "logits": random(2, 3, 4, 5), "target": torch.arange(2 * 7 * 9).remainder(3).view(2, 7, 9),
            "ignore_index": 1, "reduction": "mean", "ohem_threshold": 0.2, "ohem_min_kept": 40,
        },
    ),
    "upsample_argmax": (upsample_argmax, {"logits": random(2, 3, 4, 5), "size": (7, 9)}),
    "depthwise_gelu": (
        depthwise_gelu,
        {"tokens": random(2, 20, 3), "weight": random(3, 1, 3, 3), "bias": random(3), "size": (4, 5)},
    ),
}  # fmt: skip


# By operator: what replaces some of its arguments above, the error and its message. Every message once: which arguments
# an operator checks is what test_any_arguments shows.
BAD = {
    "channel_attention": [
        ({"query": [1.0]}, TypeError, "query must be a tensor"),
        ({"query": torch.ones(2, 1, 5, 4).long()}, TypeError, "query must have dtype"),
        ({"query": torch.ones(2, 1, 0, 4)}, ValueError, "query has N = 0"),
        ({"key": torch.ones(1, 1, 7, 6)}, ValueError, r"key must have shape .* \(1, 1, 5, 6\)"),
        ({"key": torch.ones(3, 1, 5, 6)}, ValueError, r"key must have shape .* \(2, 1, 5, 6\)"),
        ({"key": torch.ones(1, 1, 5, 6, device="meta")}, ValueError, "key is on meta, expected cpu"),
        ({"value": torch.ones(1, 1, 5, 7)}, ValueError, r"value must have shape .* \(1, 1, 5, 6\)"),
        ({"value": torch.ones(2, 1, 5, 6)}, ValueError, r"value must have shape .* \(1, 1, 5, 6\)"),
        ({"group_mask": torch.ones(3)}, TypeError, "group_mask must have dtype bool"),
        ({"group_mask": torch.ones(4).bool()}, ValueError, "4 groups, which do not divide .* L = 6"),
        ({"eps": -1e-5}, ValueError, "eps must be above 0"),
        ({"eps": 0}, ValueError, "eps must be above 0"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"seed": torch.ones(())}, TypeError, "seed must have dtype int64"),
        ({"backend": "flash"}, ValueError, "backend must be one of auto, .*got 'flash'"),
    ],
    "depthwise_gelu": [
        ({"size": (3, 4)}, ValueError, r"tokens must have shape \(B, h·w, C\) = \(2, 12, 3\), got \(2, 20"),
    ],
    "upsample_argmax": [
        ({"logits": torch.zeros(3, 4, 5)}, ValueError, r"logits must have shape \(B, K, h, w\)"),
        ({"logits": torch.zeros(2, 0, 4, 5)}, ValueError, "logits has K = 0"),
        ({"size": (7, 9, 1)}, ValueError, r"size must be a pair \(H, W\)"),
        ({"size": 7}, TypeError, r"size must be a pair \(H, W\), got 7"),
        ({"size": (7, 9.5)}, TypeError, "W of size must be an integer, got 9.5"),
        ({"size": (0, 9)}, ValueError, "H of size must be at least 1, got 0"),
    ],
    "upsample_cross_entropy": [
        ({"target": torch.full((2, 7, 9), -1)}, ValueError, "target holds class -1"),
        ({"target": torch.full((2, 7, 9), 3)}, ValueError, r"target holds class 3, expected \[0, 3\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"ignore_index": "255"}, TypeError, "ignore_index must be an integer, got '255'"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must be in"),
        ({"ohem_threshold": "0.5"}, TypeError, "ohem_threshold must be a number"),
        ({"ohem_threshold": 1.5}, ValueError, "ohem_threshold must be a probability"),
        ({"ohem_min_kept": -1}, ValueError, "ohem_min_kept must be at least 0"),
    ],
    "semantic_memory_enqueue": [
        ({"queue": torch.ones(3, 1, 5).expand(3, 4, 5)}, ValueError, "queue has strides .* clone"),
        ({"queue": torch.ones(3, 8).unfold(1, 5, 1)}, ValueError, "queue has strides .* clone"),
        ({"queue_ptr": torch.zeros(1).long().expand(3)}, ValueError, "queue_ptr has strides .* clone"),
        ({"queue_ptr": torch.tensor([0, 4, 0])}, ValueError, r"holds 4, expected slots in \[0, 4\)"),
        ({"queue_ptr": torch.tensor([0, 0, -1])}, ValueError, "queue_ptr holds -1"),
    ],
}


@st.composite
def tensors_like(draw, tensor):
    """Other sides, axes, dtype, strides, layout or device; most draws change one of them."""
    change = draw(st.sampled_from(CHANGES))
    shape = list(tensor.shape)
    if change == "shape" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 7))
    elif change == "axes":
        shape = draw(st.lists(st.integers(0, 3), max_size=5))
    dtype = draw(st.sampled_from(DTYPES)) if change == "dtype" else tensor.dtype
    values = (tensor if shape == list(tensor.shape) else random(*shape)).to(dtype)
    if change == "strides":
        return draw(st.sampled_from(views(values)))
    if change == "layout":
        return values.to_sparse()
    if change == "device":
        return values.to("meta")
    return values.clone().requires_grad_(change == "gradient" and values.is_floating_point())


def views(x):
    """The same shape in other strides; expanded ones hold one number many times."""
    if x.ndim == 0:
        return [torch.stack([x, x])[1]]
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.stack([x, x], -1)[..., 0]
    return [transposed, padded, x[:1].expand_as(x)]


@st.composite
def changed(draw, arguments):
    """One or two of the arguments replaced."""
    arguments = dict(arguments)
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        value = arguments[name]
        arguments[name] = draw(st.one_of(tensors_like(value), NO_TENSORS) if isinstance(value, Tensor) else NO_TENSORS)
    return arguments


def plain(value, dtype=None):
    """Of tensors, a dense copy without gradients, those of numbers in ``dtype``."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().to_dense().contiguous().clone()
    return copy.to(dtype) if copy.is_floating_point() else copy


def results(value):
    return (value,) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_arguments(name, data):
    run, arguments = OPERATORS[name]
    arguments = data.draw(changed(arguments))
    copies = {key: plain(value, torch.float64) for key, value in arguments.items()}
    torch.manual_seed(0)
    try:
        actual = run(**arguments)
    except (TypeError, ValueError) as error:
        assert any(key in str(error) for key in arguments)  # noqa: PT017 both outcomes are right
        return
    if any(x.is_meta for x in results(actual)):
        return
    torch.manual_seed(0)
    for result, expected in zip(results(actual), results(run(**copies)), strict=True):
        tolerance = {} if result.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(result, expected.to(result.dtype), equal_nan=True, **tolerance)


class RecordedCalls(TorchDispatchMode):
    """Which of our operators are called with which arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "allspark_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def outputs_and_grads(run, arguments):
    """Of copies of the arguments, some of which are changed in place."""
    copies = {key: plain(value) for key, value in arguments.items()}
    leaves = [copies[key].requires_grad_() for key in DIFFERENTIABLE & copies.keys()]
    outputs = list(results(run(**copies)))
    return outputs + list(torch.autograd.grad(outputs[0].sum(), leaves) if outputs[0].requires_grad else ())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_as_one_graph(name, dynamic):
    run, arguments = OPERATORS[name]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(*(outputs_and_grads(x, arguments) for x in (compiled, run)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_traces_for_a_gpu_without_one(name):
    """Nothing waits for the device."""
    run, arguments = OPERATORS[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="cuda"), arguments)
        with forbid_sync():
            outputs = run(**fakes)
    assert all(x.is_cuda for x in results(outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "channel_semantic_grouping"])
def test_registration(kernels, name, dtype):
    """What torch checks of operators, with the arguments of forward and backward, neither of which reads a number."""
    run, arguments = OPERATORS[name]
    arguments = {key: plain(x, dtype) for key, x in arguments.items() if key != "backend"}
    with forbid_sync(), RecordedCalls() as recorded:
        outputs_and_grads(run, arguments)
    assert recorded.calls
    for operator, args in recorded.calls:
        if operator.name().endswith("_backward"):
            args = pytree.tree_map_only(Tensor, Tensor.detach, args)  # noqa: PLW2901 it has no derivative
        opcheck(operator, args)


@pytest.mark.parametrize("name", ["channel_attention", "depthwise_gelu", "upsample_cross_entropy"])
def test_gradcheck(name):
    run, arguments = OPERATORS[name]
    arguments = {key: plain(x, torch.float64) for key, x in arguments.items()}
    leaves = {key: x.requires_grad_() for key, x in arguments.items() if key in DIFFERENTIABLE}
    others = {key: x for key, x in arguments.items() if key not in leaves}
    assert torch.autograd.gradcheck(
        lambda *x: run(**dict(zip(leaves, x, strict=True)), **others), tuple(leaves.values())
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_nothing(name):
    run, arguments = OPERATORS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_grads(run, arguments)
    assert all(torch.equal(x, y) for x, y in zip(actual, outputs_and_grads(run, arguments), strict=True))


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_bad_arguments_are_named(name, change, error, message):
    run, arguments = OPERATORS[name]
    with pytest.raises(error, match=message):
        run(**{**arguments, **change})
