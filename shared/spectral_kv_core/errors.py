"""The exception for wrong use."""


class UsageError(ValueError):
    """What was given cannot work: the message says what was expected, what came, and what to do.

    Every other ValueError is a fault of this library or of a host: the command line
    ends with 1 for it, and with 2 for this one. Arguments stand in backticks where a message names
    them as such: the command line puts its options in their place.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name where it has none: what a host says in pages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
