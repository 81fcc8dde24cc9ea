"""The one exception of this package."""


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and says how to mend it."""
