"""Requests to save and stop: signals, and the end of the torchrun that started this process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# SIGTERM comes from schedulers and torchrun, SIGUSR1 from `sbatch --signal`; Windows has only the former.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# The exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h.
STOPPED = 75


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Note stop signals, in the main thread: Python delivers them to no other.

    Yields:
        a function that returns whether one has arrived, or ``torchrun`` has died.
    """
    arrived: list[int] = []
    torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    noted = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in noted}
    try:
        yield lambda: bool(arrived) or (torchrun is not None and os.getppid() != torchrun)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(*_: object) -> None:
    """Ignore stop signals in a DataLoader worker: schedulers signal all processes, but the run decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
