"""GPUs that need not be there: what the compiler, the occupancy and the least time of a kernel depend on."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Peaks(NamedTuple):
    """What a GPU does in a second at most.

    Attributes:
        half: FLOPs of dense half-precision products.
        single: FLOPs of float32 products.
        bytes: of memory traffic.
        processor_clocks: clocks of all SMs or CUs together.
    """

    half: float
    single: float
    bytes: float
    processor_clocks: float


class Gpu(NamedTuple):
    """A compiler's target; shared memory in bytes."""

    target: GPUTarget
    capability: tuple[int, int]
    shared_per_block: int
    shared_per_processor: int
    warps_per_processor: int
    peaks: Peaks


KIB = 1024


def _nvidia(capability: tuple[int, int], shared_kib: int, warps: int, peaks: Peaks) -> Gpu:
    """The system takes 1 KiB of each SM's shared memory for a block."""
    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    return Gpu(target, capability, (shared_kib - 1) * KIB, shared_kib * KIB, warps, peaks)


# Peaks by the data sheets of A100 (40 GB, SXM), RTX A6000, H100 (SXM), B200 and MI300X.
GPUS = {
    "sm_80": _nvidia((8, 0), 164, 64, Peaks(312e12, 19.5e12, 1555e9, 108 * 1.41e9)),
    "sm_86": _nvidia((8, 6), 100, 48, Peaks(154.8e12, 38.7e12, 768e9, 84 * 1.80e9)),
    "sm_90": _nvidia((9, 0), 228, 64, Peaks(989e12, 67e12, 3350e9, 132 * 1.98e9)),
    "sm_100": _nvidia((10, 0), 228, 64, Peaks(2250e12, 75e12, 8000e9, 148 * 1.97e9)),
    "gfx942": Gpu(
        GPUTarget("hip", "gfx942", 64),
        (9, 4),
        64 * KIB,
        64 * KIB,
        32,
        Peaks(1307e12, 163.4e12, 5300e9, 304 * 2.10e9),
    ),
}
