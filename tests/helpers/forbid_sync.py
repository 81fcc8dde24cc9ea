"""A mode in which any operation that would wait for a GPU is an error, on CPU tensors and on fake CUDA tensors too."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Every operator whose result's value or shape only the device knows carries one of these.
_READS_THE_DEVICE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class forbid_sync(TorchDispatchMode):  # noqa: N801 reads as a verb
    """Raises AssertionError on ``.item()``, ``nonzero``, boolean indexing, copies to or from the host, and their like.

    On CPU tensors a copy between host and device does not show: run the same under FakeTensorMode with tensors made for
    "cuda" as well.

    Args:
        inside_operators: whether to look also at what our operators do on CPU tensors, not only at the call.
    """

    def __init__(self, *, inside_operators: bool = False) -> None:
        super().__init__()
        self.inside_operators = inside_operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert not _waits(func, args, kwargs), f"{func} waits for the device"
        if self.inside_operators and func.namespace == "allspark_fast":
            # As the dispatcher would go on from here, but with this mode on for what the operator calls.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        return func(*args, **kwargs)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    match func._schema.name:
        case "aten::_to_copy":
            return _copy_waits(args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking"))
        case "aten::copy_":
            return _copy_waits(args[1].device, args[0].device, kwargs.get("non_blocking", args[2:] == (True,)))
        case "aten::index" | "aten::index_put" | "aten::index_put_" | "aten::_index_put_impl_":
            return any(x is not None and x.dtype == torch.bool for x in args[1])
    return not _READS_THE_DEVICE.isdisjoint(func.tags)


def _copy_waits(source: torch.device, target: torch.device, non_blocking: bool | None) -> bool:
    """Whether the host waits: for the result, or until pageable memory has been read."""
    return source.type != target.type and (target.type == "cpu" or not non_blocking)
