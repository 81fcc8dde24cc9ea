"""Seeds and random generators that are functions of what they are for, so that any sample can be drawn again."""

import torch

_MASK = 2**64 - 1


def mix_seed(*parts: int) -> int:
    """Mix integers into one 64-bit seed with the finalizer of SplitMix64.

    For each part, ``state = finalize(state + part + 0x9E3779B97F4A7C15)`` modulo 2^64, starting from 0. The order of
    the parts matters. Changing this function changes the numbers of every run.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def make_generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded with ``mix_seed(*parts)``."""
    return torch.Generator().manual_seed(mix_seed(*parts))
