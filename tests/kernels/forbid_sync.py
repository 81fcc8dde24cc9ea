"""A mode in which any operation that would wait for a GPU is an error, on CPU tensors too."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
}


class forbid_sync(TorchDispatchMode):  # noqa: N801 reads as a verb
    """Raises AssertionError on ``.item()``, ``nonzero``, boolean indexing and their like."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        boolean_index = name in ("aten::index", "aten::index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert name not in _SYNCS and not boolean_index, f"{name} waits for the device"  # noqa: PT018
        run: Callable[..., Any] = func
        return run(*args, **(kwargs or {}))
