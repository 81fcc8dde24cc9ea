from pathlib import Path


class Malicious:
    """Makes a file ``pwned`` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path("pwned").touch, ())
