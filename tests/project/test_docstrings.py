"""Docstrings of the public names: every argument, what comes back, what goes wrong, and an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import pytest

BACKENDS = ("spectral_kv_torch", "spectral_kv_mlx")
SECTION = re.compile(r"^(Args|Returns|Raises|Examples):\n((?:[ ]{4}.*\n|\n)+)", re.M)
NEVER_RAISE = {"cache_nbytes", "capture", "restore"}  # nothing but what a host raises


def public_names() -> list:
    return [(b, name) for b in BACKENDS if importlib.util.find_spec(b) for name in _all(b)]


def _all(backend: str) -> list[str]:
    host = {"spectral_kv_torch": "torch", "spectral_kv_mlx": "mlx"}[backend]
    return importlib.import_module(backend).__all__ if importlib.util.find_spec(host) else []


def sections_of(item) -> dict[str, str]:
    """Text by title of the sections of a docstring; the summary has the title ""."""
    text = inspect.getdoc(item) + "\n"
    return {"": text[: text.find("\n\n")], **dict(SECTION.findall(text))}


def arguments(section: str) -> list[str]:
    return re.findall(r"^ {4}(\w+): \S", section, re.M)


def example_of(backend: str, item) -> str:
    """The example as that of `backend`: classes of the core, which both share, name one of them."""
    return sections_of(item)["Examples"].replace("spectral_kv_torch", backend)


def test_sections_are_found():
    def item(x):
        """Do it.

        Args:
            x: A thing: as
                long as it is.

        Raises:
            ValueError: No thing.
        """

    assert list(sections_of(item)) == ["", "Args", "Raises"]
    assert arguments(sections_of(item)["Args"]) == ["x"]


@pytest.mark.parametrize(("backend", "name"), public_names())
def test_a_public_name_says_what_it_takes_gives_and_raises(backend, name):
    item = getattr(importlib.import_module(backend), name)
    sections, signature = sections_of(item), inspect.signature(item)
    assert sections[""].rstrip(".") and len(sections[""].splitlines()) == 1
    assert arguments(sections.get("Args", "")) == list(signature.parameters)
    gives = not inspect.isclass(item) and signature.return_annotation not in (None, "None")
    assert ("Returns" in sections) == gives
    assert ("Raises" in sections) == (name not in NEVER_RAISE)
    assert ">>> " in sections["Examples"] and backend in example_of(backend, item)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "name"), public_names())
@pytest.mark.filterwarnings("error:.past_key_values.:FutureWarning")  # a name that transformers gives up
def test_the_example_of_a_public_name_runs(backend, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    example = example_of(backend, getattr(importlib.import_module(backend), name))
    test = doctest.DocTestParser().get_doctest(example, {}, f"{backend}.{name}", None, 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert test.examples and not result.failed, "".join(report)
