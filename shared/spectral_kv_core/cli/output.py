"""What reaches the terminal: one JSON object, or text without control characters; one line of an error."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from contextlib import suppress

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# fields of the library whose option has another name
OPTION_OF = {"prefixes": "prefix", "wavelets": "wavelet", "contexts": "context", "formats": "format", "texts": "text"}
SHOWN = 200  # characters of a name out of a file
LONGEST_LINE = 2000  # characters of an error, a warning or a note


def printable(text: object, most: int = SHOWN) -> str:
    """`text` on one line of at most `most` characters: white space is a space, what does not print is escaped."""
    line = " ".join(str(text)[: 4 * most].split())
    line = "".join(c if c.isprintable() else _escape(c) for c in line)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def lines_of(text: str, most: int = LONGEST_LINE) -> str:
    """`text` in the lines that it has, none longer than `most`, with what does not print escaped."""
    lines = text.split("\n")
    return "\n".join(" " * (len(line) - len(line.lstrip())) + printable(line, most) if line else "" for line in lines)


def counted(number: int, noun: str) -> str:
    """`number` of what `noun` names."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def without_control(text: str) -> str:
    """`text` as it is, but for control characters, which are escaped: a model's answer moves no cursor."""
    return CONTROL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def prepare_stdout(json_wanted: bool) -> None:
    """Let an ASCII terminal show `?` for what it lacks; raises OSError where the JSON has nowhere to go."""
    if sys.stdout is None and json_wanted:
        raise OSError("Expected standard output for --json, it is closed.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def print_json(result: dict) -> None:
    """Print `result` as the one JSON object on standard output."""
    print_all(json.dumps(result, default=to_plain))


def print_all(*lines: str) -> None:
    """Print `lines` and all that was printed before; raises OSError where standard output does not take it."""
    if sys.stdout is None:
        return
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        raise OSError(f"Expected standard output to take all that is printed, received: {error.strerror}.") from error


def drop_stdout() -> None:
    """Send what standard output does not take nowhere: the interpreter would fail on it once more when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # what is no file has no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def in_options(message: str, args: argparse.Namespace | None) -> str:
    """An error of the library in the words of the command that `args` are of: it names fields in backticks.

    Names of several words, such as budget_tokens, are fields without backticks too.
    """

    def option(found: re.Match) -> str:
        name = OPTION_OF.get(found[0].strip("`"), found[0].strip("`"))
        return f"--{name.replace('_', '-')}" if args is not None and name in args else found[0]

    return re.sub(r"`\w+`|(?<![\w`])[a-z]+(?:_[a-z]+)+(?![\w`=(])", option, message)


def to_plain(x):
    """NumPy scalars and arrays as JSON knows them, anything else as text."""
    return x.tolist() if hasattr(x, "tolist") else str(x)
