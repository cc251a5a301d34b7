"""Pictures of matplotlib as parts of a page: small, with its text color, and without ids that occur twice."""

from __future__ import annotations

import re
from html import escape
from xml.etree import ElementTree

from .markup import Markup, element
from .pictures import COLORS

XLINK = "{http://www.w3.org/1999/xlink}href"
SHARED = "g"  # what ids of outlines that all pictures of a page share begin with
PLACES = 2  # decimals of coordinates, in points
_NUMBER = re.compile(r"-?\d+\.\d+")
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_USED = re.compile(r"url\(#([^)]+)\)")


class Inliner:
    """Makes pictures parts of one page; outlines of letters and markers that return are held once."""

    def __init__(self) -> None:
        self.outlines: dict[str, str] = {}  # as text: id
        self.pictures = 0

    def inline(self, data: bytes, label: str) -> Markup:
        """The SVG file `data` of matplotlib as an element of HTML that screen readers call `label`."""
        self.pictures += 1
        root = _without_namespaces(ElementTree.fromstring(data))
        on_paper = root.find(".//image") is not None  # black and white of a map mean something
        renamed = self._take_outlines(root)
        self._rename(root, renamed)
        width = float(root.get("width").removesuffix("pt"))
        for node in root.iter():
            node.text = node.tail = None
            if not on_paper:
                _recolor(node)
            for key in ("d", "x", "y", "points"):
                if key in node.attrib:
                    node.set(key, _shorter(node.get(key)))
            if "style" in node.attrib:
                node.set("style", node.get("style").replace(": ", ":").replace("; ", ";"))
        _drop_empty(root)
        root.attrib = {
            "viewBox": root.get("viewBox"),
            "role": "img",
            "aria-label": label,
            "style": f"--width:{width / 72 * 96:.0f}px",  # inches to the pixels of CSS
            "class": "picture paper" if on_paper else "picture",
        }
        return Markup(ElementTree.tostring(root, encoding="unicode"))

    def definitions(self) -> Markup:
        """What the pictures share: to stand once in the page."""
        if not self.outlines:
            return Markup("")
        paths = Markup("".join(f'<path id="{name}" {text}/>' for text, name in self.outlines.items()))
        return element("svg", element("defs", paths), class_="shared", aria_hidden="true")

    def _take_outlines(self, root) -> dict[str, str]:
        """Move the paths of all `defs` to `outlines`; the new name of every old one."""
        renamed = {}
        for defs in root.iter("defs"):
            for path in defs.findall("path"):
                old = path.attrib.pop("id")
                path.set("d", _shorter(path.get("d", "")))  # a space has no outline
                _recolor(path)
                text = " ".join(f'{key}="{escape(value)}"' for key, value in path.attrib.items())
                renamed[old] = self.outlines.setdefault(text, f"{SHARED}{len(self.outlines)}")
                defs.remove(path)
        return renamed

    def _rename(self, root, renamed: dict[str, str]) -> None:
        """New ids where something refers to them, none elsewhere."""
        used = set()
        for node in root.iter():
            if XLINK in node.attrib and node.get(XLINK).startswith("#"):
                node.set("href", "#" + renamed[node.attrib.pop(XLINK)[1:]])
            elif XLINK in node.attrib:
                node.set("href", re.sub(r"\s", "", node.attrib.pop(XLINK)))  # a bitmap
            for value in node.attrib.values():
                used.update(_USED.findall(value))
        own = {name: f"p{self.pictures}-{number}" for number, name in enumerate(sorted(used))}
        for node in root.iter():
            if "id" in node.attrib:
                name = own.get(node.attrib.pop("id"))
                if name:
                    node.set("id", name)
            for key, value in node.attrib.items():
                node.set(key, _USED.sub(lambda found: f"url(#{own[found[1]]})", value))


def _without_namespaces(root):
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
    return root


def _drop_empty(root) -> None:
    """Drop groups that are left without content or attributes of their own."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag in ("defs", "g") and not len(child):
                parent.remove(child)


def _recolor(node) -> None:
    """Black and white as the colors of the page's text and ground, those of lines as variables of its style."""
    for key in ("style", "fill", "stroke"):
        if key in node.attrib:
            node.set(key, _COLOR.sub(lambda found: _PAGE_COLORS.get(found[0], found[0]), node.get(key)))


_PAGE_COLORS = {
    **{color.lower(): f"var(--line{number})" for number, color in enumerate(COLORS)},
    "#000000": "currentColor",
    "#ffffff": "none",
    "#e6e6e6": "var(--grid)",
    "#cccccc": "var(--bar)",
    "#bfbfbf": "var(--bar)",
}


def _shorter(numbers: str) -> str:
    """Coordinates rounded to `PLACES`, without line breaks."""
    return " ".join(_NUMBER.sub(lambda found: f"{round(float(found[0]), PLACES):g}", numbers).split())
