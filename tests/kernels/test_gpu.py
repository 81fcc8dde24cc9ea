"""The kernels as compiled for the GPU at hand: ``pytest -m gpu``.

With ``ALLSPARK_INTERPRET_GPU_TESTS=1`` on a machine without a GPU, parity at the smaller sizes is tested in Triton's
interpreter: a check of the tests, not of the kernels (bfloat16 is left out).
"""

import functools
import os

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.selftest import TOLERANCE, check_kernels
from allspark_fast.kernels.semantic_memory import reference, semantic_memory_enqueue
from allspark_fast.kernels.triton_support import set_kernels
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from tests.helpers.compare import assert_close, output_and_grads

pytestmark = pytest.mark.gpu
WITHOUT_GPU = "ALLSPARK_INTERPRET_GPU_TESTS" in os.environ and not torch.cuda.is_available()


def attention(tokens, channels=64, columns=192, *, batch=2, dropout_p=0.1):
    shapes = [(batch, 1, tokens, channels), (1, 1, tokens, columns), (1, 1, tokens, columns)]
    mask, seed = torch.tensor([True, False, True]), torch.tensor(7)
    return channel_attention, shapes, {"group_mask": mask, "dropout_p": dropout_p, "seed": seed}


def loss(classes, small, large):
    target = (torch.arange(2 * large * large) % (classes + 1)).view(2, large, large)
    return upsample_cross_entropy, [(2, classes, small, small)], {"target": target, "ignore_index": classes}


def depthwise(size, channels):
    return depthwise_gelu, [(2, size[0] * size[1], channels), (channels, 1, 3, 3), (channels,)], {"size": size}


# Differentiable operators, shapes of their inputs, and options.
CASES = {
    **{f"attention of {tokens} tokens": attention(tokens) for tokens in (9, 256, 289, 305)},
    "attention without dropout": attention(289, dropout_p=0.0),
    "attention of 5 x 21": attention(289, 5, 21, batch=3),
    "attention of 129 x 1023": attention(289, 129, 1023),
    "loss at 17": loss(3, 5, 17),
    "depthwise 1 x 7": depthwise((1, 7), 5),
    "depthwise 33 x 31": depthwise((33, 31), 130),
}
LARGE = {
    "attention of 676 tokens": attention(676),
    "attention of 1369 tokens": attention(1369),
    "attention on Pascal": attention(289, 1024, 21 * 1024),
    "loss on Pascal": loss(21, 129, 513),
    "depthwise 17 x 17": depthwise((17, 17), 2048),
    "depthwise 129 x 129": depthwise((129, 129), 256),
}


@pytest.fixture
def device():
    """The GPU, or the CPU where the kernels are interpreted."""
    if not (WITHOUT_GPU or torch.cuda.is_available()):
        pytest.skip("no CUDA device is available")
    assert WITHOUT_GPU or "TRITON_INTERPRET" not in os.environ, (
        "TRITON_INTERPRET is set: unset it to test the compiled kernels"
    )
    previous = set_kernels("triton")
    yield torch.device("cpu" if WITHOUT_GPU else "cuda")
    set_kernels(previous)


@pytest.fixture(params=TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def dtype(request):
    if WITHOUT_GPU and request.param == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    return request.param


def example(case, device, dtype):
    """Return a function that gives outputs and gradients, and inputs."""
    operator, shapes, options = case
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return functools.partial(output_and_grads, functools.partial(operator, **options)), inputs


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_parity_with_float64(device, dtype, name):
    if WITHOUT_GPU and name in LARGE:
        pytest.skip("takes the interpreter too long")
    run, inputs = example((CASES | LARGE)[name], device, dtype)
    tolerance = (2 if name.startswith("depthwise") else 1) * TOLERANCE[dtype]
    assert_close(run(inputs), run([x.double() for x in inputs]), tolerance)


@pytest.mark.parametrize("name", LARGE)
def test_recorded_and_repeated_without_a_host_sync(device, dtype, name):
    """A CUDA graph is replayed on other numbers; launches give the same bits every time."""
    if WITHOUT_GPU:
        pytest.skip("needs CUDA")
    run, inputs = example(LARGE[name], device, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(inputs)
    for x in inputs:
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, *others = (run(inputs) for _ in range(10))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(recorded, first, TOLERANCE[dtype])
    for results in others:
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))


@pytest.mark.parametrize("slots", [16, 100, 512])
def test_enqueue_equals_the_loop_every_time(device, dtype, slots):
    features = torch.randn(2, 289, 512, device=device).to(dtype)
    channel_class = torch.randint(-1, 22, (2, 512), device=device)
    queue, queue_ptr = torch.randn(289, 21, slots).permute(1, 2, 0), torch.randint(slots, (21,))
    expected = queue.clone(), queue_ptr.clone()
    reference.semantic_memory_enqueue(*expected, features.cpu(), channel_class.cpu())
    for _ in range(2 if WITHOUT_GPU else 20):
        actual = queue.to(device, copy=True), queue_ptr.to(device, copy=True)
        semantic_memory_enqueue(*actual, features, channel_class)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(actual, expected, strict=True))


def test_pseudo_labels_on_pascal(device):
    small, large = (129, 513) if device.type == "cuda" else (9, 33)
    logits = torch.randn(2, 21, small, small, device=device)
    labels, confidence = upsample_argmax(logits, (large, large))
    expected, probability = upsample_argmax(logits.double(), tuple(labels.shape[1:]))
    assert (labels != expected).sum() <= 1e-4 * labels.numel()  # up to ties
    assert_close([confidence], [probability])


def test_selftest_passes(device):
    assert not [result for result in check_kernels(device) if result.failure]
