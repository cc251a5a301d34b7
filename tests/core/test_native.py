"""Libraries of C kernels: which one a processor gets, that all choose the same codes, and how one is built and kept."""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_trellis import coefficients, mixed_rows

from spectral_kv_core import native
from spectral_kv_core.native import loader, toolchain, variants
from spectral_kv_core.native.private_folder import digest_path
from spectral_kv_core.native.variants import VARIANTS, processor_features, usable, variants_of
from spectral_kv_core.quantization import trellis

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
SERVER, LAPTOP = (frozenset(VARIANTS[i].features) | {"sse2", "f16c"} for i in (0, 1))
ANSWER, OTHER = (f"int spectralkv_answer(void) {{ return {value}; }}\n" for value in (42, 13))


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The folder of built kernels of a fresh machine, which does not exist yet."""
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    said = (loader._say_building, loader._warn_not_private)
    for once in said:
        once.cache_clear()
    yield tmp_path / "cache" / "kernels"
    for once in said:
        once.cache_clear()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one small C file."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "answer.c").write_text(ANSWER)
    return tmp_path / "source"


def compiled(code: str, work: Path) -> Path:
    """A library of its own from `code`."""
    work.mkdir(exist_ok=True)
    (work / "code.c").write_text(code)
    return toolchain.compile_library(["cc"], work, (), work)


def answer(library: ctypes.CDLL) -> int:
    """What the library of `folder` says; then the library is closed, so that the next file of its name is read again."""
    try:
        return library.spectralkv_answer()
    finally:
        _ctypes.dlclose(library._handle)


# Which library


@pytest.mark.parametrize(
    "machine, features, expected",
    [
        ("x86_64", SERVER, ["avx512", "avx2", "plain"]),
        ("AMD64", SERVER, ["avx512", "avx2", "plain"]),
        ("x86_64", SERVER - {"avx512vl"}, ["avx2", "plain"]),
        ("x86_64", LAPTOP, ["avx2", "plain"]),
        ("x86_64", LAPTOP - {"fma"}, ["plain"]),
        ("x86_64", frozenset(), ["plain"]),
        ("aarch64", frozenset({"asimd"}), ["neon"]),
        ("arm64", frozenset(), ["neon"]),
        ("riscv64", SERVER, []),
    ],
)
def test_a_processor_gets_the_fastest_library_that_it_runs(monkeypatch, tmp_path, machine, features, expected):
    for variant in VARIANTS:
        variant.path(tmp_path).parent.mkdir(exist_ok=True)
        variant.path(tmp_path).touch()
    monkeypatch.setattr(variants.platform, "machine", lambda: machine)
    monkeypatch.setattr(variants, "processor_features", lambda: features)
    assert [variant.name for variant in usable(tmp_path)] == expected
    for variant in VARIANTS:
        variant.path(tmp_path).unlink()
    assert usable(tmp_path) == []


def test_features_are_those_of_linux(monkeypatch, tmp_path):
    """Of the first processor; nothing is known where the file is missing."""
    text = "model name\t: X\nflags\t\t: fpu AVX2 fma\n\nflags\t\t: fpu\n"
    monkeypatch.setattr(variants.platform, "system", lambda: "Linux")
    for content, expected in ((text, {"fpu", "avx2", "fma"}), ("", set()), (None, set())):
        (tmp_path / "cpuinfo").write_text(content or "")
        path = tmp_path / ("cpuinfo" if content is not None else "none")
        monkeypatch.setattr(variants, "Path", lambda name, path=path: path)
        assert processor_features.__wrapped__() == expected


def test_the_c_files_ask_for_the_features_of_the_variants():
    """A feature that the code tests and a variant lacks would leave the code out; one too many would shut processors out."""
    text = (ROOT / "shared/spectral_kv_core/native/vectors.h").read_text()
    conditions = [re.findall(r"__([A-Z0-9]+)__", line) for line in text.splitlines() if "defined(" in line]
    asked = [{name.lower() for name in names} for names in conditions]
    avx512, avx2 = ({*variant.features} for variant in VARIANTS[:2])
    assert asked == [avx512 - {"avx2", "fma"}, avx2] and avx2 < avx512  # AVX-512F brings both


@needs_compiler
def test_a_library_of_the_wheel_comes_first(cache, folder, monkeypatch):
    """And one that cannot be loaded here is passed over; nothing is built while one can."""
    first, second = VARIANTS[1], VARIANTS[2]
    monkeypatch.setattr(variants.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(variants, "processor_features", lambda: LAPTOP)
    first.path(folder).parent.mkdir()
    first.path(folder).write_bytes(b"of another system")
    assert answer(native.load(folder, "")) == 42 and cache.exists()
    shutil.rmtree(cache)
    shutil.copy(compiled(OTHER, folder / "other"), second.path(folder))
    assert answer(native.load(folder, "")) == 13 and not cache.exists()
    monkeypatch.setenv("SPECTRALKV_KERNELS", "0")
    assert native.load(folder, "") is None


# What the libraries do


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, Path]:
    """The C files that choose codes, as every variant that this processor runs, and as `native` for this very one."""
    runs = [v for v in variants_of(variants.platform.machine()) if processor_features().issuperset(v.features)]
    flags = {"native": toolchain.NATIVE[0]} | {variant.name: variant.flags for variant in runs}
    assert len(flags) >= 2
    folder = tmp_path_factory.mktemp("codes")
    for source in ("shared/spectral_kv_core/native/trellis.c", "spectral_kv_torch/kernels/rounding.c"):
        shutil.copy(ROOT / source, folder)
    return {
        name: toolchain.compile_library(["cc"], folder, given, tmp_path_factory.mktemp(name))
        for name, given in flags.items()
    }


@needs_compiler
@pytest.mark.parametrize("blocks", [256, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_library_chooses_the_same_trellis_codes(libraries, monkeypatch, blocks, weighted):
    """To the bit: with multiply-add, a few differ."""
    rows = mixed_rows(4, 64)
    z, weights = coefficients(rows, 1, blocks)
    found = {}
    for name, path in libraries.items():
        monkeypatch.setattr(trellis, "library", lambda path=path: ctypes.CDLL(str(path)))
        found[name] = rows.search(z, weights if weighted else None)
    expected = found.pop("native")
    for name, codes in found.items():
        assert np.array_equal(codes, expected), (name, np.count_nonzero(codes != expected))


@needs_compiler
def test_every_library_rounds_in_time_to_the_same_codes(libraries, monkeypatch):
    torch = pytest.importorskip("torch")
    from cases import ToyModel, plan_of

    from spectral_kv_core.codecs.registry import make_codec
    from spectral_kv_torch import ops
    from spectral_kv_torch.kernels import rounding

    codec = make_codec(ops, plan_of(ToyModel(), 8, "head", "post", "expected-attention"), 0)
    z, weights = codec.coefficients(*map(torch.from_numpy, ToyModel().sample(1, 2048)), 4)
    found = {}
    for name, path in libraries.items():
        monkeypatch.setattr(rounding, "library", lambda path=path: ctypes.CDLL(str(path)))
        found[name] = rounding.round_in_time(z, weights, codec.gain, codec.time, codec.quantizers)
    expected = found.pop("native")
    for name, codes in found.items():
        assert torch.equal(codes, expected), (name, int((codes != expected).sum()))


@needs_compiler
@pytest.mark.parametrize("threads", [2, 5])
def test_a_step_is_the_same_on_any_number_of_threads(threads):
    torch = pytest.importorskip("torch")
    from cases import Case
    from test_torch_kernels import chunks_of, codec_of

    case, before, found = Case(0, 64, 3, 9, batch=2), torch.get_num_threads(), []
    codec = codec_of(case.model, 2, "trellis")
    queries, (keys, values) = case.model.queries(1, 1, 2), case.model.sample(2, 9, 2)
    call = chunks_of(codec, case, [1024] * 9 + [272]), *map(torch.from_numpy, (queries, keys, values)), 0.125
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append([codec.kernel(*call) for _ in range(5)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(step, found[0][0]) for steps in found for step in steps)


@needs_compiler
def test_libraries_name_the_threads_that_they_share_weakly(libraries):
    """Threads are those of the runtime that torch has loaded, and no runtime is loaded for them."""
    if sys.platform != "linux" or not shutil.which("nm"):
        pytest.skip("nm of Linux is not there")
    command = ["nm", "-D", "--undefined-only", str(libraries["native"])]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = dict(reversed(line.split()[-2:]) for line in listed.splitlines())
    assert {name for name, kind in symbols.items() if "omp" in name.lower()} == {"GOMP_parallel", "GOMP_barrier"}
    assert symbols["GOMP_parallel"] == symbols["GOMP_barrier"] == "w"


# How a library is built and kept


@needs_compiler
def test_a_library_is_built_once_and_the_build_says_so(cache, folder, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "spectralkv"):
        assert answer(native.load(folder, "")) == 42
    assert [record.getMessage() for record in caplog.records] == ["Building kernels once with cc: some seconds."]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {path.suffix for path in cache.iterdir() if not path.name.startswith(".")} == {".so", ".sha256"}
    loader._say_building.cache_clear()
    monkeypatch.setattr(loader, "_compile", lambda *a: pytest.fail("built twice"))
    caplog.clear()
    assert answer(native.load(folder, "")) == 42 and not caplog.records


@needs_compiler
def test_other_sources_are_another_library(cache, folder):
    assert answer(native.load(folder, "")) == 42
    (folder / "answer.c").write_text(OTHER)
    assert answer(native.load(folder, "")) == 13
    assert len(list(cache.glob("*.so"))) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "cut off", "altered", "no digest", "empty digest"])
def test_a_damaged_library_is_built_again_and_never_loaded(cache, folder, tmp_path, damage):
    assert answer(native.load(folder, "")) == 42
    (path,) = cache.glob("*.so")
    whole = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.touch()
        case "cut off":
            path.write_bytes(whole[: len(whole) // 2])
        case "altered":
            shutil.copy(compiled(OTHER, tmp_path / "other"), path)
        case _:
            shutil.copy(compiled(OTHER, tmp_path / "other"), path)
            digest_path(path).write_text("") if "empty" in damage else digest_path(path).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(native.load(folder, "")) == 42
    assert path.read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_library_planted_in_a_folder_that_others_can_write_is_not_loaded(cache, folder, tmp_path, mode):
    """Though its digest is right. One warning for all kernels of a process."""
    assert answer(native.load(folder, "")) == 42
    (path,) = cache.glob("*.so")
    path.unlink()
    shutil.copy(compiled(OTHER, tmp_path / "other"), path)
    digest_path(path).write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert answer(native.load(folder, "")) == 13  # the plant would work
    cache.chmod(mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native.load(folder, "") is None and native.load(folder, "") is None
    assert len(caught) == 1 and re.search("others could put theirs.*can be written by others", str(caught[0].message))
    cache.chmod(0o755)
    assert answer(native.load(folder, "")) == 13


@needs_compiler
@pytest.mark.parametrize("owner", ["folder", "link"])
def test_a_folder_of_somebody_else_is_refused(cache, folder, monkeypatch, tmp_path, owner):
    cache.parent.mkdir()
    if owner == "folder":
        cache.mkdir(0o700)
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    elif os.geteuid() != 0:
        pytest.skip("only root gives links away")
    else:
        (tmp_path / "elsewhere").mkdir(0o700)
        cache.symlink_to(tmp_path / "elsewhere")
        os.lchown(cache, 12345, 12345)
    with pytest.warns(UserWarning, match="belongs to somebody else"):
        assert native.load(folder, "") is None
    assert list(cache.iterdir()) == []


@needs_compiler
def test_two_processes_at_once_build_one_library(cache, folder, tmp_path):
    """The second waits for the first, and both load a whole file."""
    slow = tmp_path / "cc"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo once >> {tmp_path}/linked; sleep 1;; esac\nexec cc "$@"\n'
    )
    slow.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from spectral_kv_core import native\n"
        "sys.exit(native.load(Path(sys.argv[1]), '').spectralkv_answer())"
    )
    environment = {**os.environ, "CC": str(slow), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(folder)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [42] * 3, said
    assert (tmp_path / "linked").read_text().split() == ["once"]
    assert [path.suffix for path in sorted(cache.iterdir()) if not path.name.startswith(".")] == [".so", ".sha256"]


@needs_compiler
def test_a_compiler_with_arguments_and_one_that_fails(cache, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc -DNOTHING")
    (folder / "answer.c").write_text(ANSWER.replace("42", "\n#ifdef NOTHING\n7\n#else\n42\n#endif\n"))
    assert answer(native.load(folder, "")) == 7
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal: no memory' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="fatal: no memory.*so it is slower"):
        assert native.load(folder, "so it is slower") is None


@needs_compiler
@pytest.mark.slow
def test_kernels_are_there_when_a_cache_is_made(cache, monkeypatch):
    """Nothing is built once tokens come: the first prompt is as fast as any other."""
    pytest.importorskip("transformers")
    from torch_models import model_and_profile, tokens

    from spectral_kv_torch import make_prompt_cache
    from spectral_kv_torch.kernels import build

    monkeypatch.setattr(toolchain, "FLAGS", ("-O1", *toolchain.FLAGS[1:]))  # built sooner
    model, profile = model_and_profile("llama")
    for library in (native.library, build.library):
        library.cache_clear()
    made = make_prompt_cache(model, profile, bits=3)
    assert len(list(cache.glob("*.so"))) == 2
    monkeypatch.setattr(loader, "_compile", lambda *a: pytest.fail("built while tokens wait"))
    model(tokens(300), past_key_values=made)
    for library in (native.library, build.library):
        library.cache_clear()
