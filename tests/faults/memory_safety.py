"""Interprets the Triton kernels on random shapes with every access checked, in tensors with poisoned margins.

python -m tests.faults.memory_safety --shapes 1000

The checker (tests/helpers/triton_checks.py) raises on an access outside the arguments, a masked load without a default,
and races between programs. Margins of NaN around the inputs and of a known value around the memory show what it cannot
see: an access inside a tensor's storage, but beside its view.
"""

import argparse
import os
import random
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from tests.helpers.triton_checks import strict_interpreter

# isort: split
from allspark_fast.kernels.channel_attention import kernel as attention_kernel
from allspark_fast.kernels.depthwise_gelu import kernel as depthwise_kernel
from allspark_fast.kernels.semantic_memory import kernel as memory_kernel
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_kernel

POISON = -77.0
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inside_margins(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, poison: float = torch.nan) -> Tensor:
    """Random numbers in a larger tensor: rows before and after, columns left and right hold ``poison``."""
    larger = torch.full([n + 2 for n in shape], poison, dtype=dtype)
    view = larger[tuple(slice(1, n + 1) for n in shape)]
    view.copy_(torch.randn(shape))
    return view


def margins_are_untouched(view: Tensor) -> bool:
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(POISON)
    return bool((base == POISON).all())


def attention(source: random.Random) -> None:
    batch, heads, groups = source.randint(1, 3), source.randint(1, 2), source.randint(1, 3)
    tokens, channels, columns = source.randint(1, 40), source.randint(1, 40), groups * source.randint(1, 60)
    dtype = source.choice(DTYPES)
    keys = source.choice([1, batch])
    query = inside_margins((batch, heads, tokens, channels), dtype).requires_grad_()
    key, value = (inside_margins((keys, heads, tokens, columns), dtype).requires_grad_() for _ in range(2))
    mask = torch.rand(groups) < 0.7
    options = {"group_mask": mask, "dropout_p": source.choice([0.0, 0.3]), "seed": torch.tensor(source.randint(0, 99))}
    output = channel_attention(query, key, value, backend="triton", **options)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert all(x.isfinite().all() for x in (output, *grads))


def enqueue(source: random.Random) -> None:
    batch, classes, slots = source.randint(1, 3), source.randint(1, 5), source.randint(1, 70)
    tokens, channels = source.randint(1, 20), source.randint(1, 70)
    queue = inside_margins((classes, slots, tokens), poison=POISON)
    features = inside_margins((batch, tokens, channels), source.choice(DTYPES))
    channel_class = torch.randint(-2, classes + 2, (batch, channels))
    memory_kernel.semantic_memory_enqueue(queue, torch.randint(slots, (classes,)), features, channel_class)
    assert queue.isfinite().all()
    assert margins_are_untouched(queue)


def upsample(source: random.Random) -> None:
    """The loss, forward and backward, and the argmax."""
    batch, classes = source.randint(1, 2), source.randint(1, 20)
    logits = inside_margins((batch, classes, source.randint(1, 5), source.randint(1, 40)), source.choice(DTYPES))
    target = torch.randint(classes, (batch, source.randint(1, 9), source.randint(1, 80)))
    target[torch.rand(target.shape) < 0.2] = 255
    pixel_loss, lse = upsample_kernel.forward(logits, target, 255)
    grad = upsample_kernel.backward(inside_margins(tuple(target.shape)), logits, target, lse, 255)
    labels, confidence = upsample_kernel.upsample_argmax(logits, tuple(target.shape[1:]))
    assert all(x.isfinite().all() for x in (pixel_loss, lse, grad, confidence))
    assert ((labels >= 0) & (labels < classes)).all()


def depthwise(source: random.Random) -> None:
    """Maps of up to two tiles an axis."""
    batch, channels, size = source.randint(1, 2), source.randint(1, 70), (source.randint(1, 18), source.randint(1, 9))
    dtype = source.choice(DTYPES)
    tokens, grad = (inside_margins((batch, size[0] * size[1], channels), dtype) for _ in range(2))
    weights = inside_margins((channels, 1, 3, 3)), inside_margins((channels,))
    output = depthwise_kernel.forward(tokens, *weights, size)
    grads = depthwise_kernel.backward(grad, tokens, *weights, size)
    assert all(x.isfinite().all() for x in (output, *grads))


OPS = {op.__name__: op for op in (attention, enqueue, upsample, depthwise)}


def check(op: str, shapes: int, seed: int = 0) -> None:
    """Run an operator on random shapes; AssertionError names the number of the one on which it did wrong."""
    # One sample at a time, products in several pieces, and tiles that small inputs do not fit into.
    small = {"WORKSPACE_BYTES": 0, "PIECE_COLUMNS": 32, "ROW_COLUMNS": 64, "TILE_COLUMNS": 64}
    for number in range(seed, seed + shapes):
        torch.manual_seed(number)
        try:
            with patch.multiple(attention_kernel, **small), strict_interpreter():
                OPS[op](random.Random(number))
        except Exception as error:  # the interpreter wraps what the checker raises
            raise AssertionError(f"{op}, shape {number}: {error!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", choices=OPS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for op in options.op or OPS:
        check(op, options.shapes, options.seed)
        print(f"{op}: {options.shapes} shapes, nothing out of bounds, no race, margins untouched", flush=True)


if __name__ == "__main__":
    main()
