"""Command line: ``python -m allspark_fast COMMAND``; ``train.py`` is its train command."""

import errno
import importlib
import io
import logging
import os
import sys
import threading

from allspark_fast.cli import COMMANDS
from allspark_fast.errors import UserError
from allspark_fast.text import nearest, property_table

_USAGE = """usage: python -m allspark_fast COMMAND ...

{}

COMMAND --help tells more; --debug shows the traceback of an error."""
# What takes less memory, by command.
_LESS_MEMORY = {
    "train": "the same run goes on with --model.activation-checkpointing True and, with several processes, "
    "--train.sharding fsdp; a new one (--run.output-dir) with --train.gradient-accumulation-steps 2 or more, a smaller "
    "--data.crop or --train.batch-size, for validation --eval.mode sliding",
    "predict": "--window, or a smaller image",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    Errors that the user can mend are printed without a traceback, unless ``--debug`` is given; all others raise.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if debug := "--debug" in arguments:
        arguments.remove("--debug")
    # Services and pythonw have no standard streams, which progress bars and print need.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    rank = int(os.environ.get("RANK", "0"))  # of torchrun
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(format=f"{prefix}%(message)s")
    logging.getLogger("allspark_fast").setLevel(logging.WARNING if rank else logging.INFO)
    if not debug:
        # TensorBoard's thread hands its OSError (a full disk) to the main thread, which says it.
        threading.excepthook = lambda args: (
            None if isinstance(args.exc_value, OSError) else threading.__excepthook__(args)
        )
    # Before Python 3.12, argparse gives an empty list for a positional argument that is a second "--".
    if not arguments or arguments[0] not in COMMANDS or arguments.count("--") > 1:
        asked = arguments[:1] in (["-h"], ["--help"])
        if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
            print(f"error: there is no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}", file=sys.stderr)
        print(_USAGE.format(property_table(COMMANDS)), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *rest = arguments
    try:
        return importlib.import_module(f"allspark_fast.cli.{name}").run(rest)
    except KeyboardInterrupt:
        resumes = "; the same command goes on from the last checkpoint" if name == "train" else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        # By the name of torch's error, because torch may not be loaded; its CPU allocator raises a RuntimeError.
        out_of_memory = (
            isinstance(error, MemoryError)
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error)
        )
        if debug or not (out_of_memory or isinstance(error, UserError | OSError)):
            raise
        print(f"{prefix}error: {error}", file=sys.stderr)
        if out_of_memory:
            advice = _LESS_MEMORY.get(name, "end other programs, or use a machine with more of it")
            print(f"{prefix}out of memory; what takes less: {advice}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
