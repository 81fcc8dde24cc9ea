"""Training steps as replays of a CUDA graph: one launch in place of thousands, for which the GPU would wait."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from allspark_fast.data.loader import SemiBatch
from allspark_fast.training.step import Losses, TrainState, train_step

# Steps before the capture: kernels are compiled and libraries choose theirs, neither of which can be captured.
_WARMUP_STEPS = 3


class GraphedSteps:
    """``train_step`` on a GPU, captured once in each phase of training and replayed from then on.

    The first three steps of a phase run eagerly; every step counts. What a step allocates stays allocated. The random
    numbers are those of eager steps.

    Args:
        state: on a GPU, of a run with one process.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._phase: tuple[bool, bool] | None = None
        self._warmup_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: SemiBatch, *, use_memory: bool, use_pseudo: bool = True) -> Losses:
        """Take a step; arguments as ``train_step``'s, batches all of one size.

        Returns:
            the losses, which the next step overwrites.
        """
        if self._phase != (use_memory, use_pseudo):
            self._phase = use_memory, use_pseudo
            self._warmup_steps = _WARMUP_STEPS
            if self._graph is not None:
                torch.cuda.synchronize()  # its memory is freed with it
                self._graph = None
        if self._warmup_steps:
            self._warmup_steps -= 1
            return self._warm_up(batch)
        if self._graph is None:
            self._record(batch)
        else:
            for recorded, given in zip(self._batch, batch, strict=True):
                if recorded is not None and given is not None:
                    recorded.copy_(given)
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _step(self, batch: SemiBatch) -> Losses:
        assert self._phase is not None
        use_memory, use_pseudo = self._phase
        return train_step(self.state, batch, use_memory=use_memory, use_pseudo=use_pseudo)

    def _warm_up(self, batch: SemiBatch) -> Losses:
        """Warm up on a side stream, as CUDA graph capture requires."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # one for all: each stream keeps memory of its own
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, batch: SemiBatch) -> None:
        self._batch = SemiBatch(*(None if x is None else x.clone() for x in batch))  # type: ignore[arg-type]
        self._graph = torch.cuda.CUDAGraph()
        # The thread that pins batches goes on meanwhile.
        with _capturable(self.state.optimizer), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._losses = self._step(self._batch)


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let AdamW be captured, which its fused form can be as it is; SGD has no such switch."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
