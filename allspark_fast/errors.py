"""Errors that whoever gave a command can mend: commands print their message, without a traceback."""


class UserError(Exception):
    """Base class; the message names what is wrong, says what was expected and how to mend it."""


class InputError(UserError, ValueError):
    """A setting, a file or an argument of a command is wrong."""


class DataError(InputError):
    """Something is wrong with the user's images, labels or lists; the message names the file."""


class RunError(UserError, RuntimeError):
    """Work that had begun cannot go on: another rank failed, a worker died, the loss is not finite."""


class MissingPackageError(UserError, ImportError):
    """A package that is optional is needed, and not installed."""
