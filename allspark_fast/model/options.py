"""Options of the AllSpark bottleneck, passed as one object from the configuration to the memory."""

from dataclasses import dataclass
from typing import Literal, get_args

from allspark_fast.kernels.arguments import check_choice, check_count, check_number

MemoryInit = Literal["randn", "empty"]
MemorySync = Literal["rank0", "all"]
ClassMap = Literal["logits", "softmax"]


@dataclass(frozen=True, kw_only=True)
class AllSparkOptions:
    """Heads, dropout and named switches of the bottleneck; the defaults are those of the reference implementation.

    Attributes:
        num_heads: attention heads H.
        dropout: probability of dropout on attention maps and output projections in training, in [0, 1).
        memory_init: ``randn`` fills the memory with noise, which is attended until overwritten; ``empty`` masks classes
            that never received a channel.
        memory_sync: with several processes, ``rank0`` starts each step from rank 0's memory, into which every rank
            enqueues its own channels; ``all`` enqueues the channels of every rank, so that all memories stay equal.
        class_map: scores that assign channels to classes: ``logits``, or their ``softmax`` over K.

    Raises:
        TypeError, ValueError: an option is of another type, out of its range, or unknown.
    """

    num_heads: int = 2
    dropout: float = 0.1
    memory_init: MemoryInit = "randn"
    memory_sync: MemorySync = "rank0"
    class_map: ClassMap = "logits"

    def __post_init__(self) -> None:
        check_count("num_heads", self.num_heads)
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, choices in {"memory_init": MemoryInit, "memory_sync": MemorySync, "class_map": ClassMap}.items():
            check_choice(name, getattr(self, name), get_args(choices))
