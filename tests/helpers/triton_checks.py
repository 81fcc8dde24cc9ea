"""Triton's interpreter made exact and strict: rounding to bfloat16, bounds of every access, races of programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

if torch.cuda.is_available():
    pytest.skip("these tests interpret kernels, the GPU tests run them", allow_module_level=True)

_Builder = interpreter.InterpreterBuilder


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Roundings as on a GPU: the interpreter (triton 3.6 to 3.8) truncates."""
    cast = _Builder.cast_impl

    def rounded_cast(self: object, x: object, dtype: object) -> object:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    with patch.object(_Builder, "cast_impl", rounded_cast):
        yield


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """torch.empty fills with NaN, so that nothing is right by chance."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class KernelMemoryError(AssertionError):
    """A kernel touched memory that it must not, or in an order that no launch guarantees."""


class _Launch:
    """What the programs of one launch touch; its tensor arguments are all that they may."""

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes = [1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        self.ranges = [
            (x.data_ptr(), x.data_ptr() + n * x.itemsize) for x, n in zip(tensors, sizes, strict=True) if x.numel()
        ]
        self.reads: list[tuple[int, np.ndarray]] = []
        self.writes: list[tuple[int, np.ndarray]] = []

    def touch(self, builder: object, kind: str, pointers: object, mask: object) -> None:
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), pointers.data.shape)
        addresses = pointers.data[active].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for start, stop in self.ranges:
            inside |= (addresses >= start) & (addresses + size <= stop)
        if not inside.all():
            raise KernelMemoryError(f"{kind} out of bounds in program {builder.grid_idx}")
        unique = np.unique(addresses)
        if kind == "store" and len(unique) < addresses.size:
            raise KernelMemoryError(f"two lanes of one store write the same address in program {builder.grid_idx}")
        program = np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
        (self.writes if kind == "store" else self.reads).append((int(program), unique))

    def check_races(self) -> None:
        """No program may touch what another one writes."""
        writes, touched = (
            np.unique(np.concatenate([np.stack([a, np.full_like(a, p)]) for p, a in log], axis=1), axis=1)
            for log in (self.writes, self.writes + self.reads)
        )
        addresses, programs = np.unique(touched[0], return_counts=True)
        if np.isin(addresses[programs > 1], writes[0]).any():
            raise KernelMemoryError("race: one program touches what another one writes")


@contextmanager
def checked_memory() -> Iterator[None]:
    """Raise if a launch leaves its tensors, loads under a mask without a default, or has a race."""
    current: list[_Launch] = []
    execute = interpreter.GridExecutor.__call__
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def checked_execute(self: object, *args: object, **kwargs: object) -> None:
        current[:] = [_Launch([x for x in args if isinstance(x, Tensor)])]
        execute(self, *args, **kwargs)
        current[0].check_races()

    def checked_load(self: object, pointers: object, mask: object, other: object, *rest: object) -> object:
        current[0].touch(self, "load", pointers, mask)
        if other is None and not np.asarray(mask.data).all():
            raise KernelMemoryError("a masked load without a default gives anything on a GPU")
        return load(self, pointers, mask, other, *rest)

    def checked_store(self: object, pointers: object, value: object, mask: object, *rest: object) -> object:
        current[0].touch(self, "store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(interpreter.GridExecutor, "__call__", checked_execute),
        patch.object(_Builder, "create_masked_load", checked_load),
        patch.object(_Builder, "create_masked_store", checked_store),
    ):
        yield


@contextmanager
def strict_interpreter() -> Iterator[None]:
    """All of the above at once, without NumPy's warnings of what masked lanes compute."""
    with exact_bfloat16(), uninitialized_memory_is_nan(), checked_memory(), np.errstate(all="ignore"):
        yield
