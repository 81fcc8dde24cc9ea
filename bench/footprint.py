"""Memory that a training step holds on a GPU, counted on fake CUDA tensors: nothing runs."""

from collections.abc import Iterator
from importlib.util import find_spec

from allspark_fast.model import MIT_CONFIGS, build_segmentor
from bench.harness import Record, table
from bench.step_cost import count_saved_bytes, fake_tensors
from bench.step_variants import StepSize, make_variant

# The encoder of the recipe ``folder`` is timm's.
SIZES = (*(["timm/tf_efficientnet_lite0"] if find_spec("timm") else []), "mit_b0", "mit_b2", "mit_b5")
# Weights, gradients, both moments of AdamW and averaged weights, all float32.
_COPIES = 5
_CROPS = (321, 513)
_BATCHES = (2, 4)
_CLASSES = 21
_COLUMNS = {
    "encoder": ("size", 1.0),
    "crop": ("crop", 1),
    "batch": ("batch", 1),
    "weights and optimizer GB": ("state_bytes", 1e-9),
    "activations GB": ("saved_bytes", 1e-9),
    "together GB": ("bytes", 1e-9),
    "with checkpointing GB": ("checkpointed_bytes", 1e-9),
}


def measure(backbone: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """Count the bytes of one encoder at several crops and batch sizes; yields records and their table."""
    records: list[Record] = []
    for crop in _CROPS:
        for batch in _BATCHES:
            size = StepSize(backbone, batch, _CLASSES, crop)
            state, saved = count_bytes(size, checkpointing=False)
            # Only MiT can compute its blocks again.
            checkpointed = count_bytes(size, checkpointing=True)[1] if backbone in MIT_CONFIGS else None
            records.append(
                {
                    "op": "footprint",
                    "size": backbone,
                    "crop": crop,
                    "batch": f"{batch} + {batch}",
                    "state_bytes": state,
                    "saved_bytes": saved,
                    "bytes": state + saved,
                    "checkpointed_bytes": None if checkpointed is None else state + checkpointed,
                }
            )
    yield records, table(records, _COLUMNS)


def count_bytes(size: StepSize, *, checkpointing: bool) -> tuple[int, int]:
    """Bytes of weights, gradients, optimizer and averaged weights; and of what a bfloat16 step keeps for backward."""
    with fake_tensors("cuda"):
        model = build_segmentor(
            size.backbone,
            size.classes,
            (size.crop, size.crop),
            embedding_dim=size.embedding_dim,
            activation_checkpointing=checkpointing,
        ).train()
        parameters = sum(x.nbytes for x in model.parameters())
        buffers = sum(x.nbytes for x in model.buffers())
        variant = make_variant("ours bfloat16", model, size.random_batch())
        return _COPIES * parameters + 2 * buffers, count_saved_bytes(variant)
