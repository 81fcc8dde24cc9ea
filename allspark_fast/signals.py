"""Requests to save and stop: signals, and the end of the torchrun that started this process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# SIGTERM comes from schedulers and torchrun, SIGUSR1 from `sbatch --signal`, which Windows lacks, SIGINT from Ctrl-C.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
_INTERRUPTED = b"\nCtrl-C: the step in hand is finished and all is saved; Ctrl-C again ends the run at once\n"
# The exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h.
STOPPED = 75


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Note stop signals instead of dying of them, but of a second Ctrl-C, in the main thread: no other gets any.

    Yields:
        a function that returns whether one has arrived, or ``torchrun`` has died.
    """
    arrived: list[int] = []
    torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def note(number: int, _: object) -> None:
        arrived.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            with suppress(OSError):
                os.write(2, _INTERRUPTED)  # sys.stderr may be in the middle of a line

    is_main = threading.current_thread() is threading.main_thread()
    # What runs in the background of a script ignores Ctrl-C.
    noted = [x for x in STOP_SIGNALS if is_main and signal.getsignal(x) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield lambda: bool(arrived) or (torchrun is not None and os.getppid() != torchrun)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(*_: object) -> None:
    """Ignore stop signals in a DataLoader worker: schedulers signal all processes, but the run decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
