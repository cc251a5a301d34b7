"""HTML in which text is escaped unless it says that it is HTML."""

from __future__ import annotations

from html import escape

VOID = ("img",)  # elements that have no end
_UNSEEN = {number: "\ufffd" for number in range(32) if chr(number) not in "\t\n"}  # no characters of HTML


class Markup(str):
    """Text that is HTML already."""


def element(name: str, *children, **attributes) -> Markup:
    """`<name ...>children</name>`; whatever is not `Markup` is escaped, None is left out.

    An attribute loses a last underscore (`class_`) and other underscores become hyphens; of its values, None and False
    leave it out and True stands for a name without a value.
    """
    shown = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            shown.append(f" {key}")
        elif value is not None and value is not False:
            shown.append(f' {key}="{_escaped(value)}"')
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{''.join(shown)}>{joined(children)}{end}")


def joined(children) -> Markup:
    """`children` one after another, escaped where they are not `Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children if c is not None))


def _escaped(x) -> str:
    return escape(str(x)).translate(_UNSEEN)
