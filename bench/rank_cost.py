"""What a training step costs a rank in memory and communication, by formula: nothing is run or measured."""

from collections.abc import Iterator

import torch

from allspark_fast.model import Segmentor
from allspark_fast.model.mit import Block
from bench.harness import Record, table
from bench.step_variants import SIZES

RANKS = (1, 4, 64)
_COLUMNS = {
    "ranks": ("ranks", 1),
    "sharding": ("sharding", 1),
    "state MB": ("state_bytes", 1e-6),
    "gathered MB": ("gathered_bytes", 1e-6),
    "sent MB": ("sent_bytes", 1e-6),
    "memory rank0 MB": ("memory_rank0_bytes", 1e-6),
    "memory all MB": ("memory_all_bytes", 1e-6),
}


def measure(size: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """Records of a size of ``step_variants.SIZES``, whose batch is that of each rank."""
    with torch.device("meta"):
        model = SIZES[size].build_model()
    common: Record = {"op": "rank_cost", "size": str(SIZES[size])}
    records: list[Record] = [
        {**common, "ranks": ranks, "sharding": sharding, **rank_cost(model, ranks, sharding, batch=SIZES[size].batch)}
        for ranks in RANKS
        for sharding in (("fsdp", "replicate") if ranks > 1 else ("none",))
    ]
    yield records, table(records, _COLUMNS)


def rank_cost(model: Segmentor, ranks: int, sharding: str, *, batch: int) -> Record:
    """Bytes of one rank.

    Rings are assumed: of n bytes, gathering or scattering sends n · (ranks - 1) / ranks and an all-reduce twice that.
    Blocks are gathered in bfloat16 for the pseudo-label pass, for the forward and for the backward pass; the rest once,
    in float32; gradients are added in float32.

    Args:
        model: with the bottleneck; may be on the meta device.
        ranks: number of processes.
        sharding: ``fsdp``, or anything else for weights that every rank has.
        batch: labeled images of a rank.

    Returns:
        ``state_bytes`` of float32 weights, gradients and momentum (SGD), with FSDP also the copy that is evaluated;
        ``gathered_bytes``, FSDP's largest block and the rest while they are whole; ``sent_bytes`` of weights and
        gradients in a step; and what a step receives for either ``model.memory_sync``.
    """
    blocks = [sum(p.numel() for p in x.parameters()) for x in model.backbone.modules() if isinstance(x, Block)]
    parameters = sum(p.numel() for p in model.parameters())
    rest = parameters - sum(blocks)
    ring = (ranks - 1) / ranks
    sharded = sharding == "fsdp"
    assert model.decoder.allspark is not None
    queue = model.decoder.allspark.attn.kv_queue
    channels = model.decoder.allspark.attn_norm.normalized_shape[0]
    return {
        "state_bytes": 12 * parameters / ranks + 4 * parameters if sharded else 12 * parameters,
        "gathered_bytes": 2 * max(blocks) + 4 * rest if sharded else 0,
        "sent_bytes": ring * (3 * 2 * sum(blocks) + 4 * rest + 4 * parameters if sharded else 2 * 4 * parameters),
        "memory_rank0_bytes": 4 * queue.numel() if ranks > 1 else 0,
        # Features of unlabeled images in float32, and the class of each channel as int64.
        "memory_all_bytes": (ranks - 1) * batch * channels * (4 * queue.shape[2] + 8),
    }
