"""The kernels as compiled for the GPU at hand: ``pytest -m gpu``.

With ``ALLSPARK_INTERPRET_GPU_TESTS=1`` on a machine without a GPU, the tests that need no CUDA run in Triton's
interpreter: a check of the tests, not of the kernels (bfloat16 is left out).
"""

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.selftest import TOLERANCE, check_kernels, passed, results_table
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, reference, semantic_memory_enqueue
from allspark_fast.kernels.triton_support import is_interpreted, set_kernels
from tests.helpers.compare import assert_close, output_and_grads

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = "ALLSPARK_INTERPRET_GPU_TESTS" in os.environ and not torch.cuda.is_available()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, or the CPU where the kernels are interpreted."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no CUDA device is available")
    assert INTERPRETED or not is_interpreted(), "TRITON_INTERPRET is set: unset it to test the compiled kernels"
    previous = set_kernels("triton")
    yield torch.device("cpu" if INTERPRETED else "cuda")
    set_kernels(previous)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for tests of what only CUDA has."""
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture(params=DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    return request.param


def inputs(
    device: torch.device, dtype: torch.dtype, tokens: int, *, batch: int = 2, channels: int = 64, columns: int = 192
) -> list[Tensor]:
    shapes = [(batch, 1, tokens, channels), (1, 1, tokens, columns), (1, 1, tokens, columns)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def options(device: torch.device, dropout_p: float) -> dict[str, object]:
    mask = torch.tensor([True, False, True], device=device)
    return {"group_mask": mask, "dropout_p": dropout_p, "seed": torch.tensor(7, device=device)}


def run(tensors: list[Tensor], function: Callable[..., Tensor] = channel_attention, **kwargs: object) -> list[Tensor]:
    """Output and gradients."""
    return output_and_grads(functools.partial(function, **kwargs), tensors)


def assert_parity(tensors: list[Tensor], **kwargs: object) -> None:
    expected = run([x.double() for x in tensors], backend="reference", **kwargs)
    assert_close(run(tensors, backend="triton", **kwargs), expected, TOLERANCE[tensors[0].dtype])


class TestChannelAttention:
    """Against the materialised reference in float64."""

    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    @pytest.mark.parametrize("tokens", [9, 256, 289, 305, 676, 1369])
    def test_tokens(self, device: torch.device, dtype: torch.dtype, tokens: int, dropout_p: float) -> None:
        assert_parity(inputs(device, dtype, tokens), **options(device, dropout_p))

    @pytest.mark.parametrize(("channels", "columns"), [(5, 21), (17, 57), (129, 1023)])
    def test_sizes_that_fill_no_tile(
        self, device: torch.device, dtype: torch.dtype, channels: int, columns: int
    ) -> None:
        tensors = inputs(device, dtype, 289, batch=3, channels=channels, columns=columns)
        assert_parity(tensors, **options(device, 0.1))

    def test_a_training_step(self, cuda: torch.device, dtype: torch.dtype) -> None:
        """Pascal, whose products over the columns are cut into pieces."""
        assert_parity(inputs(cuda, dtype, 289, channels=1024, columns=21 * 1024), **options(cuda, 0.1))

    def test_compiles_as_one_graph(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        compiled = torch.compile(channel_attention, fullgraph=True)
        assert_close(run(tensors, compiled, **kwargs), run(tensors, **kwargs), TOLERANCE[dtype])

    def test_is_captured_in_a_cuda_graph(self, cuda: torch.device, dtype: torch.dtype) -> None:
        """Forward and backward, replayed on other numbers."""
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(tensors, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(tensors, **kwargs)
        for x in tensors:
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close(captured, run(tensors, **kwargs), TOLERANCE[dtype])

    def test_no_host_sync(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        assert_no_sync(lambda: run(tensors, **kwargs))

    def test_offsets_beyond_2_to_the_31(self, cuda: torch.device) -> None:
        """Only the last group of a key of more than 2^31 numbers counts."""
        need_bytes(40e9)
        tokens, kept = 1369, 64
        groups = 2**31 // (tokens * kept) + 2
        assert tokens * groups * kept > 2**31
        tensors = inputs(cuda, torch.bfloat16, tokens, batch=1, channels=32, columns=groups * kept)
        mask = torch.arange(groups, device=cuda) == groups - 1
        output, grad_query, *grads = run(tensors, group_mask=mask)
        assert not any(x[..., 0].any() for x in grads)
        ends = [tensors[0].double(), *(x[..., -kept:].double() for x in tensors[1:])]
        actual = [output, grad_query, *(x[..., -kept:] for x in grads)]
        assert_close(actual, run(ends, backend="reference"), TOLERANCE[torch.bfloat16])


class TestSemanticMemory:
    """Grouping up to ties, and enqueue bit for bit."""

    @pytest.mark.parametrize(("tokens", "classes", "channels"), [(289, 21, 512), (676, 19, 129), (1369, 81, 64)])
    def test_grouping(self, device: torch.device, dtype: torch.dtype, tokens: int, classes: int, channels: int) -> None:
        features = torch.randn(2, tokens, channels, device=device).to(dtype)
        class_map = torch.randn(2, classes, tokens, device=device)
        chosen = channel_semantic_grouping(features, class_map)
        similarity = torch.nn.functional.normalize(class_map.double(), dim=2) @ features.double()
        best, actual = similarity.amax(1), similarity.gather(1, chosen[:, None])[:, 0]
        assert ((best - actual).abs() <= 1e-5 * best.abs()).all()  # up to ties

    @pytest.mark.parametrize("slots", [16, 100, 512])
    def test_enqueue_equals_the_loop_every_time(self, device: torch.device, dtype: torch.dtype, slots: int) -> None:
        features = torch.randn(2, 289, 512, device=device).to(dtype)
        channel_class = torch.randint(-1, 22, (2, 512), device=device)
        queue, queue_ptr = torch.randn(289, 21, slots).permute(1, 2, 0), torch.randint(slots, (21,))
        expected = queue.clone(), queue_ptr.clone()
        reference.semantic_memory_enqueue(*expected, features.cpu(), channel_class.cpu())
        for _ in range(3 if INTERPRETED else 20):
            actual = queue.to(device, copy=True), queue_ptr.to(device, copy=True)
            semantic_memory_enqueue(*actual, features, channel_class)
            assert all(torch.equal(x.cpu(), y) for x, y in zip(actual, expected, strict=True))

    def test_no_host_sync(self, cuda: torch.device, dtype: torch.dtype) -> None:
        features = torch.randn(2, 289, 512, device=cuda, dtype=dtype)
        class_map = torch.randn(2, 21, 289, device=cuda)
        queue, queue_ptr = torch.zeros(21, 64, 289, device=cuda), torch.zeros(21, dtype=torch.int64, device=cuda)

        def step() -> None:
            semantic_memory_enqueue(queue, queue_ptr, features, channel_semantic_grouping(features, class_map))

        assert_no_sync(step)

    def test_offsets_beyond_2_to_the_31(self, cuda: torch.device) -> None:
        need_bytes(6e9)
        tokens, classes, channels = 1369, 21, 64
        slots = 2**31 // (tokens * classes) + 1024
        queue = torch.zeros(tokens, classes, slots, dtype=torch.bfloat16, device=cuda).permute(1, 2, 0)
        assert queue.numel() > 2**31
        queue_ptr = torch.full((classes,), slots - channels // 2, device=cuda)
        features = torch.randn(1, tokens, channels, dtype=torch.bfloat16, device=cuda)
        semantic_memory_enqueue(queue, queue_ptr, features, torch.full((1, channels), classes - 1, device=cuda))
        written = torch.cat([queue[-1, -channels // 2 :], queue[-1, : channels // 2]])
        assert torch.equal(written, features[0].mT)
        assert not queue[0, -1].any()
        assert queue_ptr[-1] == channels // 2


class TestDepthwiseGelu:
    """Against torch's convolution and GELU in float64."""

    def inputs(
        self, device: torch.device, dtype: torch.dtype, batch: int, size: tuple[int, int], channels: int
    ) -> list[Tensor]:
        """Tokens, and float32 weights as under autocast."""
        tokens = torch.randn(batch, size[0] * size[1], channels, device=device).to(dtype)
        return [tokens, *(torch.randn(shape, device=device) for shape in ((channels, 1, 3, 3), (channels,)))]

    @pytest.mark.parametrize(("size", "channels"), [((129, 129), 256), ((17, 17), 2048), ((33, 31), 130), ((1, 7), 5)])
    def test_sizes(self, device: torch.device, dtype: torch.dtype, size: tuple[int, int], channels: int) -> None:
        if INTERPRETED:
            size, channels = (min(size[0], 3), min(size[1], 9)), min(channels, 66)
        tensors = self.inputs(device, dtype, 2, size, channels)
        expected = run([x.double() for x in tensors], depthwise_gelu, size=size)
        assert_close(run(tensors, depthwise_gelu, size=size), expected, 2 * TOLERANCE[dtype])

    def test_no_host_sync(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors = self.inputs(cuda, dtype, 2, (33, 33), 128)
        assert_no_sync(lambda: run(tensors, depthwise_gelu, size=(33, 33)))

    def test_is_the_same_every_time(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors = self.inputs(cuda, dtype, 2, (65, 65), 128)
        first, *others = (run(tensors, depthwise_gelu, size=(65, 65)) for _ in range(10))
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(other, first, strict=True))

    def test_offsets_beyond_2_to_the_31(self, cuda: torch.device) -> None:
        """The end of a map of more than 2^31 numbers, against that of a map that begins a row before it."""
        need_bytes(24e9)
        size, channels, rows = (2050, 1024), 1024, 4
        tokens = torch.zeros(1, size[0] * size[1], channels, dtype=torch.bfloat16, device=cuda)
        assert tokens.numel() > 2**31
        tokens[:, -rows * size[1] :].normal_()
        _, weight, bias = self.inputs(cuda, torch.bfloat16, 1, (1, 1), channels)
        outputs = []
        for x in (tokens, tokens[:, -rows * size[1] :].clone()):
            leaf = x.requires_grad_()
            output = depthwise_gelu(leaf, weight, bias, (leaf.shape[1] // size[1], size[1]))
            (grad,) = torch.autograd.grad(output, leaf, output.detach())
            outputs.append([y[:, -(rows - 2) * size[1] :].double() for y in (output, grad)])
        assert_close(outputs[0], outputs[1], TOLERANCE[torch.bfloat16])


def test_selftest_passes(device: torch.device) -> None:
    results = check_kernels(device)
    assert passed(results), results_table(results)


def assert_no_sync(function: Callable[[], object]) -> None:
    """Run once to compile, then with every host sync an error."""
    function()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def need_bytes(count: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < count:
        pytest.skip(f"needs {count / 1e9:.0f} GB of free GPU memory, found {free / 1e9:.0f} GB")
