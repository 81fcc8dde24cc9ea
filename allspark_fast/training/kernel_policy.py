"""Which operators of a run use Triton: those whose kernels pass the self-test on this machine, once and then cached."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Literal

import torch

from allspark_fast.files import write_atomically
from allspark_fast.kernels import selftest
from allspark_fast.kernels.selftest import Result, check_kernels
from allspark_fast.kernels.triton_support import TRITON_OPS, disable_triton, is_interpreted, why_no_triton
from allspark_fast.kernels.tuning import cache_folder

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "strict", "torch"]


def select_kernels(mode: Kernels, device: torch.device) -> dict[str, str]:
    """Turn off, for this process, what must not or cannot run in Triton on ``device``.

    Args:
        mode: ``auto`` replaces kernels that fail by plain torch, ``strict`` does not, ``torch`` replaces all.
        device: on which they will run.

    Returns:
        reasons by operator, of those that failed and are replaced.

    Raises:
        RuntimeError: a kernel fails, or none can run, and the mode is ``strict``; or a kernel made the GPU unusable.
    """
    if mode == "torch":
        for op in TRITON_OPS:
            disable_triton(op)
        return {}
    reason = why_no_triton(device)
    if reason is not None:
        if mode == "strict":
            raise RuntimeError(f"kernels are strict, but none can run: {reason}; use auto or torch")
        return {}
    results = remembered_results(device)
    if results is None:
        logger.info("checking the Triton kernels, once for this machine")
        results = check_and_remember(device)
    failures = {x.op: f"{x.dtype}, {x.case}: {x.failure}" for x in reversed(results) if x.failure}
    if failures and mode == "strict":
        listed = "; ".join(f"{op} ({text})" for op, text in failures.items())
        raise RuntimeError(f"kernels are strict, but these fail the self-test: {listed}")
    for op, text in failures.items():  # `python -m allspark_fast selftest` checks anew
        logger.warning("the Triton kernel of %s fails here (%s): plain torch replaces it in this run", op, text)
        disable_triton(op)
    return failures


def check_and_remember(device: torch.device) -> list[Result]:
    """Run the self-test, and write its results into the cache if kernels ran.

    Raises:
        RuntimeError: a kernel made the GPU unusable for this process.
    """
    results = check_kernels(device)
    if why_no_triton(device) is None:
        path = _cache_path(device)
        text = json.dumps([result._asdict() for result in results], indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            logger.warning("%s cannot be written (%s): the kernels will be checked again next time", path, error)
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except RuntimeError as error:
        failed = next(result.op for result in results if result.failure)
        raise RuntimeError(
            f"the kernel of {failed} made the GPU unusable for this process; the same command again leaves it out"
        ) from error
    return results


def remembered_results(device: torch.device) -> list[Result] | None:
    """What the self-test found on this machine, by the cache; None if there is nothing of this version in it."""
    path = _cache_path(device)
    if not path.is_file():
        return None
    try:
        return [Result(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s): the kernels are checked again", path, error)
        return None


def _cache_path(device: torch.device) -> Path:
    digest = hashlib.sha256(json.dumps(_machine(device)).encode()).hexdigest()[:16]
    return cache_folder() / f"selftest_{digest}.json"


def _machine(device: torch.device) -> list[str]:
    """All that the results depend on; the sources of the operators stand for the package's version."""
    import triton  # noqa: PLC0415 optional

    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    capability = torch.cuda.get_device_capability(device) if on_gpu else ""
    sources = hashlib.sha256()
    for path in sorted(Path(selftest.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    versions = [torch.__version__, triton.__version__, sources.hexdigest()]
    return [name, str(capability), f"interpreted {is_interpreted()}", *versions]
