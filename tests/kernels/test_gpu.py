"""The kernels as compiled for the GPU at hand: ``pytest -m gpu``.

With ``ALLSPARK_INTERPRET_GPU_TESTS=1`` on a machine without one, those that need nothing of CUDA's run in Triton's
interpreter: a check of the tests, not of the kernels (bfloat16 is left out).
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.selftest import TOLERANCE, check_kernels, passed, results_table
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, reference, semantic_memory_enqueue
from allspark_fast.kernels.triton_support import is_interpreted, prefers_triton
from allspark_fast.kernels.tuning import fixed

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = "ALLSPARK_INTERPRET_GPU_TESTS" in os.environ and not torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU that interprets."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU is there")
    assert not is_interpreted(), "TRITON_INTERPRET is set: unset it, for the GPU's own code to be tested"
    return torch.device("cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for tests of what CUDA alone has."""
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
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def options(device: torch.device, dropout_p: float) -> dict[str, object]:
    mask = torch.tensor([True, False, True], device=device)
    return {"group_mask": mask, "dropout_p": dropout_p, "seed": torch.tensor(7, device=device)}


def output_and_grads(
    tensors: list[Tensor], attend: Callable[..., Tensor] = channel_attention, **kwargs: object
) -> list[Tensor]:
    output = attend(*tensors, **kwargs)
    # Equal for all dtypes, as the inputs are; float16 has no linspace of so many steps.
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).bfloat16().to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, weight.view(output.shape))]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, target in zip(actual, expected, strict=True):
        error = (x.double() - target).abs().max() / target.abs().max()
        assert error <= tolerance, f"{x.dtype} {tuple(x.shape)} is wrong by {error:.1e}"


def assert_parity(tensors: list[Tensor], **kwargs: object) -> None:
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = output_and_grads(doubles, backend="reference", **kwargs)
    assert_close(output_and_grads(tensors, backend="triton", **kwargs), expected, TOLERANCE[tensors[0].dtype])


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

    def test_auto_is_triton(self, cuda: torch.device, dtype: torch.dtype) -> None:
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("the kernels are for compute capability 8.0 and above")
        assert prefers_triton("channel_attention", torch.empty(1, dtype=dtype, device=cuda))

    def test_compiles_as_one_graph(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        compiled = torch.compile(channel_attention, fullgraph=True)
        expected = [x.double() for x in output_and_grads(tensors, **kwargs)]
        assert_close(output_and_grads(tensors, compiled, **kwargs), expected, TOLERANCE[dtype])

    def test_is_captured_in_a_cuda_graph(self, cuda: torch.device, dtype: torch.dtype) -> None:
        """Forward and backward, replayed on other numbers."""
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                output_and_grads(tensors, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = output_and_grads(tensors, **kwargs)
        with torch.no_grad():
            for x in tensors:
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        expected = [x.double() for x in output_and_grads(tensors, **kwargs)]
        assert_close(captured, expected, TOLERANCE[dtype])

    def test_waits_for_nothing(self, cuda: torch.device, dtype: torch.dtype) -> None:
        tensors, kwargs = inputs(cuda, dtype, 289), options(cuda, 0.1)
        assert_no_sync(lambda: output_and_grads(tensors, **kwargs))

    def test_offsets_beyond_2_to_the_31(self, cuda: torch.device) -> None:
        """Only the last columns of a key of more than 2^31 numbers count."""
        need_bytes(40e9)
        tokens, kept = 1369, 1024
        columns = (2**31 // tokens // kept + 2) * kept
        assert tokens * columns > 2**31
        tensors = [torch.randn(1, 1, tokens, x, dtype=torch.bfloat16, device=cuda) for x in (32, columns, columns)]
        leaves = [x.requires_grad_() for x in tensors]
        ends = [leaves[0].detach(), *(x[..., -kept:].detach() for x in leaves[1:])]
        mask = torch.arange(columns // kept, device=cuda) == columns // kept - 1
        actual = output_and_grads(leaves, group_mask=mask, backend="triton")
        assert not actual[2][..., 0].any()
        actual[2:] = [x[..., -kept:] for x in actual[2:]]
        doubles = [x.double().requires_grad_() for x in ends]
        assert_close(actual, output_and_grads(doubles, backend="reference"), TOLERANCE[torch.bfloat16])


class TestSemanticMemory:
    """Grouping and enqueue, bit for bit."""

    @pytest.mark.parametrize(("tokens", "classes", "channels"), [(289, 21, 512), (676, 19, 129), (1369, 81, 64)])
    def test_grouping(self, device: torch.device, dtype: torch.dtype, tokens: int, classes: int, channels: int) -> None:
        features = torch.randn(2, tokens, channels, device=device).to(dtype)
        class_map = torch.randn(2, classes, tokens, device=device)
        chosen = channel_semantic_grouping(features, class_map)
        similarity = torch.nn.functional.normalize(class_map.double(), dim=2) @ features.double()
        best, actual = similarity.amax(1), similarity.gather(1, chosen[:, None])[:, 0]
        assert ((best - actual).abs() <= 1e-5 * best.abs()).all()  # up to ties

    @pytest.mark.parametrize("slots", [16, 100, 512])
    def test_enqueue_is_that_of_the_loop_every_time(self, device: torch.device, dtype: torch.dtype, slots: int) -> None:
        features = torch.randn(2, 289, 512, device=device).to(dtype)
        channel_class = torch.randint(-1, 22, (2, 512), device=device)
        queue, queue_ptr = torch.randn(289, 21, slots).permute(1, 2, 0), torch.randint(slots, (21,))
        expected = queue.clone(), queue_ptr.clone()
        reference.semantic_memory_enqueue(*expected, features.cpu(), channel_class.cpu())
        for _ in range(3 if INTERPRETED else 20):
            actual = queue.to(device, copy=True), queue_ptr.to(device, copy=True)
            semantic_memory_enqueue(*actual, features, channel_class)
            assert all(torch.equal(x.cpu(), y) for x, y in zip(actual, expected, strict=True))

    def test_waits_for_nothing(self, cuda: torch.device, dtype: torch.dtype) -> None:
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

    def leaves(
        self, device: torch.device, dtype: torch.dtype, batch: int, size: tuple[int, int], channels: int
    ) -> list:
        """Tokens, and float32 weights as under autocast."""
        tokens = torch.randn(batch, size[0] * size[1], channels, device=device).to(dtype)
        shapes = (channels, 1, 3, 3), (channels,)
        return [x.requires_grad_() for x in (tokens, *(torch.randn(shape, device=device) for shape in shapes))]

    # 0 and 1 are the tiles, 2 is torch's form.
    @pytest.mark.parametrize("choice", [0, 1, 2])
    @pytest.mark.parametrize(("size", "channels"), [((129, 129), 256), ((17, 17), 2048), ((33, 31), 130), ((1, 7), 5)])
    def test_every_choice(
        self, device: torch.device, dtype: torch.dtype, size: tuple[int, int], channels: int, choice: int
    ) -> None:
        if INTERPRETED:
            size, channels = (min(size[0], 3), min(size[1], 9)), min(channels, 66)
        leaves = self.leaves(device, dtype, 2, size, channels)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        with fixed(choice):
            actual = output_and_grads(leaves, lambda *x: depthwise_gelu(*x, size))
        expected = output_and_grads(exact, lambda *x: depthwise_gelu(*x, size))
        # Convolutions of float32 may multiply in TF32, unlike our kernels.
        assert_close(actual, expected, 1e-2 if choice == 2 else 2 * TOLERANCE[dtype])

    def test_waits_for_nothing(self, cuda: torch.device, dtype: torch.dtype) -> None:
        leaves = self.leaves(cuda, dtype, 2, (33, 33), 128)
        assert_no_sync(lambda: output_and_grads(leaves, lambda *x: depthwise_gelu(*x, (33, 33))))

    def test_is_the_same_every_time(self, cuda: torch.device, dtype: torch.dtype) -> None:
        leaves = self.leaves(cuda, dtype, 2, (65, 65), 128)
        with fixed(0):
            first, *others = (output_and_grads(leaves, lambda *x: depthwise_gelu(*x, (65, 65))) for _ in range(10))
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(other, first, strict=True))

    def test_offsets_beyond_2_to_the_31(self, cuda: torch.device) -> None:
        """The end of a map of more than 2^31 numbers, against that of a map that begins a row before it."""
        need_bytes(24e9)
        size, channels, rows = (2050, 1024), 1024, 4
        tokens = torch.zeros(1, size[0] * size[1], channels, dtype=torch.bfloat16, device=cuda)
        assert tokens.numel() > 2**31
        tokens[:, -rows * size[1] :].normal_()
        end = tokens[:, -rows * size[1] :].detach().clone()
        _, weight, bias = (x.detach() for x in self.leaves(cuda, torch.bfloat16, 1, (1, 1), channels))
        outputs = []
        for x in (tokens, end):
            leaf = x.requires_grad_()
            with fixed(0):
                output = depthwise_gelu(leaf, weight, bias, (leaf.shape[1] // size[1], size[1]))
                (grad,) = torch.autograd.grad(output, leaf, output.detach())
            outputs.append([y[:, -(rows - 2) * size[1] :].double() for y in (output, grad)])
        assert_close(outputs[0], outputs[1], TOLERANCE[torch.bfloat16])


def test_selftest_passes(device: torch.device) -> None:
    results = check_kernels(device)
    assert passed(results), results_table(results)


def assert_no_sync(function: Callable[[], object]) -> None:
    """Run once to compile, then with every wait for the device an error."""
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
        pytest.skip(f"needs {count / 1e9:.0f} GB of free GPU memory, {free / 1e9:.0f} GB are")
