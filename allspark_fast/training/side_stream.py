"""What a recorded step computes beside the encoder's forward pass, where both leave much of a GPU idle."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from allspark_fast.model import Segmentor
from allspark_fast.model.mit import MixTransformer


@contextmanager
def beside_encoder(model: Segmentor) -> Iterator[None]:
    """Run the pseudo pass, and what follows from it, beside the encoder of the model's next forward pass.

    Where a step is recorded, it is a branch of the graph that the decoder waits for. Ordinary steps would gain nothing:
    a GPU waits for their launches.
    """
    recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if not recorded or not may_be_beside(model):
        yield
        return
    encoding, beside = torch.cuda.current_stream(), _stream(next(model.parameters()).device)
    beside.wait_stream(encoding)
    with torch.cuda.stream(beside):
        yield

    def wait(*_: object) -> None:
        encoding.wait_stream(beside)
        joined.remove()

    joined = model.decoder.register_forward_pre_hook(wait)


def may_be_beside(model: Segmentor) -> bool:
    """Whether neither branch writes what the other one reads or writes, which is so for Mix Transformers.

    Of other encoders one would read the statistics of BatchNorm that the other writes, and weights that autocast cast
    for it and keeps for both. FSDP gathers weights for both.
    """
    return isinstance(model.backbone, MixTransformer) and not isinstance(model, FSDPModule)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)
