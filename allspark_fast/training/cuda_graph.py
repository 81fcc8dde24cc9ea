"""Training steps as replays of a CUDA graph: one launch in place of thousands, for which the GPU would wait."""

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import all_reduce_any
from allspark_fast.errors import RunError
from allspark_fast.files import reason
from allspark_fast.training.checkpoint import random_states, set_random_states
from allspark_fast.training.log import Record
from allspark_fast.training.step import Losses, TrainState, train_step

logger = logging.getLogger(__name__)

# Ordinary steps of a phase before its recording: kernels are compiled, libraries choose theirs, and NCCL connects the
# ranks, none of which can be captured.
WARMUP_STEPS = 3
# A replay may differ from an ordinary step by so many times what two ordinary ones differ, by this part of the change
# that a step makes, and by so many rounding errors of what it changes.
_NOISES, _PART_OF_CHANGE, _ROUNDINGS = 4, 1e-2, 4

# The losses of a step, and what takes it again and overwrites them.
Recording = tuple[Losses, Callable[[], object]]
Recorder = Callable[[Callable[[], Losses], torch.cuda.Stream | None], Recording]


def capture(step: Callable[[], Losses], stream: torch.cuda.Stream | None) -> Recording:
    """Capture a step on a stream, without taking it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads go on meanwhile: that which pins batches, and NCCL's watchdog.
    capturing = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), capturing:  # the stream is restored even if capture fails
        losses = step()
    return losses, graph.replay


class GraphedSteps:
    """``train_step``, recorded once in each phase of training and replayed from then on.

    The first three steps of a phase, or of batches of another size, are ordinary. Every step counts, and draws the same
    random numbers as an ordinary one. What a step allocates stays allocated. If it cannot be recorded, for lack of
    memory say, it and all others are ordinary. Collectives of several ranks are recorded too; all ranks decide alike.

    Args:
        state: what the steps change.
        report: takes the figures of a comparison, made unless it is None: the first replay of each phase against two
            ordinary steps from the same state and random numbers. If it differs by more than these, the ordinary step
            counts, and nothing is recorded any more.
        record: ``capture``, or what stands for it.
    """

    def __init__(
        self, state: TrainState, report: Callable[[Record], object] | None = None, record: Recorder = capture
    ) -> None:
        self.state = state
        self.recording = True
        self._report = report
        self._record_step = record
        self._phase: tuple[torch.Size, dict[str, bool]] = torch.Size(), {}
        self._warmup_steps = 0
        self._replay: Callable[[], object] | None = None
        # One for all: each stream keeps memory of its own.
        self._stream = torch.cuda.Stream() if state.step.is_cuda else None
        # Without this AdamW cannot be captured; with it, it warns in ordinary steps. The fused one is the same anyway.
        for group in state.optimizer.param_groups:
            group["capturable"] = True
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")

    def __call__(self, batch: SemiBatch, **options: bool) -> Losses:
        """Take a step; arguments as ``train_step``'s. The next step may overwrite the losses.

        Raises:
            RunError: a step of a sharded model cannot be recorded.
        """
        if (phase := (batch.image.shape, options)) != self._phase:
            self.release()
            self._phase, self._warmup_steps = phase, WARMUP_STEPS
        if self._warmup_steps or not self.recording:
            self._warmup_steps = max(self._warmup_steps - 1, 0)
            return self._take(batch)
        if self._replay is None:
            return self._record(batch)
        for recorded, given in zip(self._batch, batch, strict=True):
            if recorded is not None and given is not None:
                recorded.copy_(given)
        self._replay()
        return self._losses

    def release(self) -> None:
        """Free the recording; before the process group is left, which its collectives keep alive."""
        if self._replay is not None and self._stream is not None:
            torch.cuda.synchronize()  # its memory is freed with it
        self._replay = None

    def _take(self, batch: SemiBatch) -> Losses:
        """Take an ordinary step, on a side stream until it is recorded, as CUDA graph capture requires."""
        if self._stream is None or not self.recording:
            return train_step(self.state, batch, **self._phase[1])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = train_step(self.state, batch, **self._phase[1])
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, batch: SemiBatch) -> Losses:
        """Record a step and take it, by its first replay unless that is wrong."""
        copies = []
        if self._report is not None:  # before the recording, so that their memory is free again by then
            copies.append(self._copy(torch.zeros(len(Losses._fields))))
            for _ in range(2):
                copies.append(self._copy(torch.stack(self._take(batch))))
                self._restore(copies[0])
        self._batch = SemiBatch(*(None if x is None else x.clone() for x in batch))  # type: ignore[arg-type]
        failure = ""
        try:
            step = functools.partial(train_step, self.state, self._batch, **self._phase[1])
            self._losses, self._replay = self._record_step(step, self._stream)
        except RuntimeError as error:
            failure = reason(error)
        if all_reduce_any(bool(failure)):
            failure = failure or "it failed on another rank"
            if self.state.replica is not None:  # FSDP is in the middle of a step
                raise RunError(f"a step cannot be recorded ({failure}): go on with --train.cuda_graph off")
            self._stop_recording(failure)
            return self._take(batch)
        assert self._replay is not None
        self._replay()
        if self._report is not None:
            found = largest_difference([*copies, self._copy(torch.stack(self._losses))])
            self._report({"recorded_step": found})
            if all_reduce_any(found["error"] > found["allowed"]):
                self._stop_recording(f"a replay is no ordinary step, or differs on another rank ({found})")
                self._restore(copies[1])
                return Losses(*copies[1]["losses"].to(batch.image.device))
        return self._losses

    def _copy(self, losses: Tensor) -> dict[str, Any]:
        """Copy all that a step changes to the CPU, where there is memory."""
        found = {"state": self.state.state_dict(), "random": random_states(self.state.step.device), "losses": losses}
        return pytree.tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), found)

    def _restore(self, copy: dict[str, Any]) -> None:
        self.state.load_state_dict(copy["state"])
        set_random_states(copy["random"])

    def _stop_recording(self, why: str) -> None:
        self.release()
        self.recording = False
        logger.warning("steps are not recorded as a CUDA graph, and take longer: %s", why)


def largest_difference(copies: Sequence[dict[str, Any]]) -> Record:
    """Return how far a replay is from an ordinary step, in the worst tensor, and how far it may be, in norms.

    The copies of what a step changes are of before it, after it, after it again, and after the replay.
    """
    figures: list[Record] = []
    for (path, start), *others in zip(*(pytree.tree_flatten_with_path(x)[0] for x in copies), strict=True):
        if isinstance(start, Tensor):
            before, after, again, replayed = (x.double().nan_to_num() for x in (start, *(x for _, x in others)))
            error, noise, change = ((x - after).norm().item() for x in (replayed, again, before))
            rounding = after.norm().item() * (torch.finfo(start.dtype).eps if start.is_floating_point() else 0)
            allowed = _NOISES * noise + _PART_OF_CHANGE * change + _ROUNDINGS * rounding
            name = pytree.keystr(path)
            figures.append({"tensor": name, "error": error, "noise": noise, "change": change, "allowed": allowed})
    return max(figures, key=lambda x: x["error"] / max(x["allowed"], 1e-30))
