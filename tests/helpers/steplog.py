"""Training steps as lists of calls, which stand for CUDA graphs on a CPU: recorded once, then replayed in place."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils import _pytree as pytree

from allspark_fast.kernels.semantic_memory import op as memory
from allspark_fast.kernels.upsample_cross_entropy import op as cross_entropy
from allspark_fast.training import step as training_step
from allspark_fast.training.checkpoint import random_states, set_random_states
from allspark_fast.training.cuda_graph import GraphedSteps, Recording
from allspark_fast.training.sharding import to_local
from allspark_fast.training.side_stream import may_be_beside
from allspark_fast.training.step import Losses, TrainState
from tests.helpers.forbid_sync import forbid_sync

_AFTER_REDUCE_SCATTER = (torch.ops.aten.split.Tensor, torch.ops.aten.copy_.default)


class StepLog(forbid_sync):
    """Logs all calls, those inside our operators too; an AssertionError if Python reads a number, which may decide."""

    def __init__(self) -> None:
        super().__init__(inside_operators=True)
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # operator, arguments, result
        self.branches: list[tuple[slice, slice]] = []  # calls that a GPU makes at once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # After a reduce-scatter gloo copies from memory of its own, as it does again when a replay waits for it.
        of_gloo = func in _AFTER_REDUCE_SCATTER and "reduce_scatter" in str(self.calls[-1][0])
        if func.namespace not in ("allspark_fast", "profiler") and not of_gloo:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def allocate(self, x: Tensor, alloc_storage: Any = _fsdp_param.alloc_storage) -> None:
        """Stand for FSDP's allocation of gathered weights, which is no call of an operator."""
        alloc_storage(x)
        self.calls.append((lambda: x, (), {}, x))

    @contextmanager
    def beside_encoder(self, model: nn.Module) -> Iterator[None]:
        """Stand for a branch of the graph, which the decoder waits for."""
        fork = len(self.calls)
        yield
        encoder = len(self.calls)

        def join(*_: object) -> None:
            self.branches.append((slice(fork, encoder), slice(encoder, len(self.calls))))
            joined.remove()

        joined = model.decoder.register_forward_pre_hook(join)

    def races(self) -> set[int]:
        """The memory that a branch writes or makes, and the other one touches."""
        found = set()
        for branches in self.branches:
            (touched, written), (other, written_there) = (self._touched(x) for x in branches)
            found |= written & other | written_there & touched
        return found

    def _touched(self, calls: slice) -> tuple[set[int], set[int]]:
        touched, written = set(), set()
        for operator, args, kwargs, result in self.calls[calls]:
            inputs, named = storages((args, kwargs)), operator._schema.arguments
            values = [*args, *(kwargs.get(x.name) for x in named[len(args) :])]
            changed = [x for argument, x in zip(named, values, strict=True) if argument.is_write]
            touched |= inputs | storages(result)
            written |= storages(changed) | (storages(result) - inputs)
        return touched, written

    @torch.no_grad()
    def replay(self) -> None:
        """Make all calls again on the same memory: in place, or copied to where the logged result lies."""
        for operator, args, kwargs, result in self.calls:
            inputs, again = storages((args, kwargs)), operator(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(new, torch.ScriptObject):  # of a collective
                    new.wait()
                elif isinstance(old, Tensor) and not storages(old) <= inputs:
                    old.copy_(new)

    def foreign(self, known: Any) -> set[int]:
        """The memory that calls read or write, but neither made nor know: nobody keeps it for a replay."""
        made, found = storages(known), set()
        for operator, args, kwargs, result in self.calls:
            # A number of Python, as in x[0] = 0, which a GPU gets by a fill.
            if operator is not torch.ops.aten.lift_fresh.default:
                found |= storages((args, kwargs)) - made
            made |= storages(result)
        return found


def storages(tree: Any) -> set[int]:
    """The memory of all tensors of a tree."""
    return {to_local(x).untyped_storage()._cdata for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)}


def logged_steps(state: TrainState, **options: Any) -> GraphedSteps:
    """Steps on a CPU that are recorded as logs."""

    def record(step: functools.partial[Losses], _: object) -> Recording:
        before, random = copy.deepcopy(state.state_dict()), random_states(torch.device("cpu"))
        # On CPU tensors, and only there, operators look for labels that are no class and for wrong pointers. What FSDP
        # frees stays where it is.
        checks = patch.object(cross_entropy, "_check_classes"), patch.object(memory, "_check_pointers")
        log = StepLog()
        sharded = patch.multiple(_fsdp_param, free_storage=lambda _: None, alloc_storage=log.allocate)
        branch = log.beside_encoder if may_be_beside(state.model) else lambda _: nullcontext()
        rates, halves = [group["lr"] for group in state.optimizer.param_groups], [*vars(state.half_weights).values()]
        try:
            with checks[0], checks[1], sharded, patch.object(training_step, "beside_encoder", branch), log:
                losses = step()
            assert not log.races(), "what is written in one branch of a graph is used in the other"
            assert not log.foreign([state.state_dict(), rates, halves, step.args])
        finally:  # a capture takes no step, even if it fails
            state.load_state_dict(before)
            set_random_states(random)
        return losses, log.replay

    return GraphedSteps(state, record=record, **options)
