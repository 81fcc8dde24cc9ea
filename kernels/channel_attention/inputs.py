"""What the forms of channel attention take."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of the operator: see ``op.channel_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    column_mask: Tensor | None  # bool (L,), the mask of groups for columns; None if all count
    dropout_p: float
    seed: Tensor | None  # None without dropout
