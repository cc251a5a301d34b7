"""The habits of the project: what workflows call, what a release needs, what a quick run leaves out."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from quick import one_of_each

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILES = (ROOT / "Makefile", ROOT / "results" / "measure.mk")
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def targets() -> dict[str, str]:
    """Targets that a person types -> the rest of their line."""
    text = "\n".join(path.read_text() for path in MAKEFILES)
    return dict(re.findall(r"^([a-z][a-z0-9-]*):(?!=)(.*)", text, re.M))


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job["steps"]]


# --- make


def test_every_target_has_a_line_in_help():
    help_text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+) +\S", help_text, re.M) == list(targets())


def test_every_target_without_a_file_is_phony():
    phony = " ".join(re.findall(r"^\.PHONY:(.*)", "\n".join(path.read_text() for path in MAKEFILES), re.M)).split()
    assert set(targets()) <= set(phony)


def test_every_extra_is_pinned():
    """So that a fresh machine tests with the versions of this one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in asked}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert names - {name.lower() for name in pinned} == set()


# --- workflows


@every_workflow
def test_a_step_is_an_action_or_a_target(path):
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"]), "pinned by its major version"
        else:
            call = re.fullmatch(r'make (?:--silent )?([a-z-]+)(?: >> "\$GITHUB_STEP_SUMMARY")?', step["run"])
            assert call and call[1] in targets(), step["run"]


@every_workflow
def test_a_workflow_may_read_only_and_ends(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 90, name
    assert "://" not in path.read_text(), "no address of a package index or of anything else"


def test_only_the_upload_may_ask_for_an_identity():
    writing = {
        f"{path.stem}.{name}": job["permissions"] for path in WORKFLOWS for name, job in jobs(path).items()
        if "permissions" in job
    }  # fmt: skip
    assert writing == {
        "docs.deploy": {"pages": "write", "id-token": "write"},
        "release.publish": {"id-token": "write"},
    }
    publish = jobs(ROOT / ".github" / "workflows" / "release.yml")["publish"]
    assert publish["environment"] and set(publish["needs"]) == {"check", "wheels"}
    assert [step["uses"].split("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


def test_hooks_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks[0]["hooks"])


# --- guide for contributors


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert target in targets(), f"make {target}"
    for name in re.findall(r"`((?:shared|docs|tests|tools|profiles|results|spectral_kv_\w+|\.github)/[^`\s]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("what", ["scorer", "codec", "backend"])
def test_six_steps_to_add(what):
    section = re.search(rf"^## Add a {what}\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
    assert re.findall(r"^(\d)\. ", section, re.M) == list("123456")


# --- releases


@pytest.fixture(scope="module")
def release_check():
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_changelog_and_citation_agree(release_check):
    texts = [(ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff")]
    assert release_check.problems(release_check.package_version(), *texts) == []


RELEASED = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-31\n\n- One.\n\n## [1.1.0] - 2026-10-01\n\n- Zero.\n"
CITED = "title: spectralkv\nversion: 1.2.0\ndate-released: 2026-12-31\n"


def test_a_release_that_agrees(release_check):
    assert release_check.problems("1.2.0", RELEASED, CITED, "v1.2.0") == []
    assert release_check.problems("1.2.0", RELEASED.replace("## [Unreleased]\n\n", ""), CITED, "v1.2.0") == []
    assert release_check.problems("1.2.0", RELEASED.replace("]\n", "]\n\n- Two.\n", 1), CITED) == []


@pytest.mark.parametrize(
    "old, new, tag, expected",
    [
        ("", "", "v1.2.1", "tag: expected v1.2.0, received v1.2.1"),
        ("", "", "1.2.0", "tag: expected v1.2.0"),
        ("[Unreleased]\n", "[Unreleased]\n\n- Two.\n", "v1.2.0", "expected nothing under [Unreleased]"),
        (
            "[1.2.0] - 2026-12-31",
            "[1.3.0] - 2026-12-31",
            "v1.2.0",
            "expected entries under [1.2.0] on top, found 1.3.0",
        ),
        ("- One.\n", "", "v1.2.0", "expected entries under [1.2.0] on top"),
        (" - 2026-12-31", "", "v1.2.0", "expected a date such as 2026-12-31 behind [1.2.0], found None"),
        (" - 2026-12-31", " - 2026-13-31", "v1.2.0", "expected a date"),
        ("date-released: 2026-12-31", "date-released: 2026-12-30", "v1.2.0", "expected date-released 2026-12-31"),
        ("version: 1.2.0", "version: 1.1.0", "", "expected version 1.2.0, found 1.1.0"),
        ("", "", "", "expected 1.2.0 or entries under [Unreleased] on top, found Unreleased"),
        ("## [", "## ", "", "expected a section such as [Unreleased]"),
    ],
)
def test_a_release_that_does_not(release_check, old, new, tag, expected):
    changelog, citation = (text.replace(old, new) if old else text for text in (RELEASED, CITED))
    assert any(expected in problem for problem in release_check.problems("1.2.0", changelog, citation, tag))


def test_a_wheel_without_a_file_is_noticed(release_check, tmp_path):
    """Such as the C sources, which the source archive may leave out."""
    (tmp_path / "spectral_kv_torch" / "kernels").mkdir(parents=True)
    for name in ("ops.py", "kernels/latent.c"):
        (tmp_path / "spectral_kv_torch" / name).write_text("")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("spectral_kv_torch/ops.py", "")
    assert release_check.missing(tmp_path / "x.whl", tmp_path) == ["spectral_kv_torch/kernels/latent.c"]


# --- the quick run


def item(test: str, slow: bool = False, **params):
    """A test as pytest collects it."""
    found = SimpleNamespace(parent=SimpleNamespace(nodeid="tests/test_x.py"), originalname=test)
    found.get_closest_marker = lambda name: name if slow and name == "slow" else None
    if params:
        found.callspec = SimpleNamespace(params=params)
    return found


def test_a_quick_run_has_one_case_of_every_test_on_every_library():
    kept = [
        item("test_a"),
        item("test_b", xp="numpy", size=1),
        item("test_b", xp="torch", size=1),
        item("test_c", size=1),
        item("test_d", host="mlx", size=1),
    ]
    left = [item("test_b", xp="numpy", size=2), item("test_c", size=2), item("test_d", host="mlx", size=2)]
    assert one_of_each([*kept, *left, item("test_e", slow=True)]) == kept
