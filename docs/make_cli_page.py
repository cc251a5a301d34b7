"""Writes docs/reference/cli.md from the parser of the command line: python docs/make_cli_page.py [--check]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from spectral_kv_core.cli.main import build_parser  # the only place of docs/ that knows where the parser is

PAGE = Path(__file__).parent / "reference" / "cli.md"
HEAD = """<!-- Made by docs/make_cli_page.py from the parser. Change the parser, not this page. -->
# Command line

`spectralkv COMMAND --help` prints the same. `--json` prints one JSON object on standard output.
Exit codes are 0 for done, 2 for wrong use and 1 for anything else. An error is one line that says what to do.
"""


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The whole page: the commands, then a section for each with a table of its options."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    lines = [HEAD, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {cell(helps[name])} |" for name in commands.choices]
    for name, command in commands.choices.items():
        lines += ["", f"## {name}", "", f"{sentence(helps[name])}", "", "```text", usage(command, name), "```", ""]
        lines += ["| option | meaning |", "|---|---|", *options(command)]
    return "\n".join(lines) + "\n"


def usage(command: argparse.ArgumentParser, name: str) -> str:
    """What must be given; the options that may be follow in the table."""
    needed = [spelled(action) for action in command._actions if action.required]
    for group in command._mutually_exclusive_groups:
        if group.required:
            needed.append(f"({' | '.join(spelled(action) for action in group._group_actions)})")
    return " ".join(["spectralkv", name, *needed, "[options]"])


def options(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{spelled(action)}`"
        value = f" `{metavar(action)}`" if action.option_strings and metavar(action) else ""
        choices = [f"one of {', '.join(f'`{choice}`' for choice in action.choices)}"] if action.choices else []
        needed = ["required"] if action.required else []
        yield f"| {names}{value} | {'; '.join([cell(helped(action)), *choices, *needed])} |"


def spelled(action: argparse.Action) -> str:
    value = metavar(action)
    return f"{action.option_strings[0]} {value}".strip() if action.option_strings else value


def metavar(action: argparse.Action) -> str:
    """What stands for the value of an option; nothing for a flag."""
    if action.nargs == 0:
        return ""
    name = action.metavar or action.dest.replace("_", "-").upper()
    return f"{name} ..." if action.nargs in ("+", "*") else name


def helped(action: argparse.Action) -> str:
    """The help text with its defaults filled in, as argparse prints it."""
    return (action.help or "") % {"default": action.default, "prog": "spectralkv"}


def sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
