"""Tables live once per model and plan, everything that a cache holds is told, and a second cache costs next to nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
from hosts import SMALL, buffers_of, tokens

from spectral_kv_core.errors import UsageError
from spectral_kv_core.planning import shared_codecs
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.profile import stored_profile
from spectral_kv_core.profile.profile import Profile

BITS = {"spectral": 2.0, "spectral-trellis": 2.0, "spectral-dense": 1.5, "turboquant": 3.0, "think": 12.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Profiles in files, by host and family."""
    folder = tmp_path_factory.mktemp("profiles")

    def file(host, name: str):
        path = folder / f"{host.NAME}-{name}.safetensors"
        return path if path.exists() else host.profile(name).save(path)

    return file


@pytest.fixture(autouse=True)
def nothing_left():
    """Caches of other tests are gone."""
    gc.collect()
    yield
    gc.collect()


def read(host, cache, pieces: int = 1, model: str = "llama") -> object:
    """`cache`, with a prompt of 200 tokens in so many pieces, and two steps."""
    ids = tokens(200, seed=3)
    size = len(ids) // pieces
    for start in range(0, len(ids), size):
        host.raw_logits(host.model(model), ids[start : start + size], cache)
    for token in (5, 9):
        host.raw_logits(host.model(model), [token], cache)
    return cache


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("method", BITS)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "memory"])
def test_everything_that_a_cache_holds_is_told(host, files, method, pieces, in_file):
    profile = files(host, "llama") if in_file else host.profile("llama")
    make = lambda: host.make_prompt_cache(host.model("llama"), profile, BITS[method], method=method, **SMALL)  # noqa: E731
    first, second = (read(host, make(), pieces) for _ in range(2))
    size = host.cache_nbytes(first)
    assert size.table_nbytes > 0
    assert sum(buffers_of(host, host.layers(first)).values()) == size + size.table_nbytes
    both = sum(buffers_of(host, host.layers(first), host.layers(second)).values())
    assert both == size + host.cache_nbytes(second) + size.table_nbytes


@pytest.mark.parametrize("method", ["spectral", "triattention+spectral", "spectral-dense"])
def test_a_profile_goes_once_codecs_are_made(host, files, method):
    options = {"budget_tokens": 150} if "+" in method else {}
    cache = host.make_prompt_cache(host.model("llama"), files(host, "llama"), 2.0, method=method, **options, **SMALL)
    read(host, cache, 2)
    gc.collect()
    known = stored_profile._known.values()
    assert not [
        x for x in gc.get_objects() if type(x) is Profile and x.basis_sets and x.path in {p.path for p in known}
    ]
    assert host.leading_layers(cache)[0].plan.profile.model == "llama"


def test_codecs_go_with_the_last_cache(host, files):
    caches = [host.make_prompt_cache(host.model("llama"), files(host, "llama"), 2.0, **SMALL) for _ in range(2)]
    first, second = (host.leading_layers(read(host, cache, 2))[0].store.codec for cache in caches)
    assert first is second and len(shared_codecs._made) == 2  # with those that hold a prompt
    del first, second
    caches.pop()
    gc.collect()
    assert len(shared_codecs._made) == 2
    caches.pop()
    gc.collect()
    assert not len(shared_codecs._made)


def test_a_cache_goes_without_the_garbage_collector(host, files):
    gc.disable()
    try:
        cache = read(host, host.make_prompt_cache(host.model("llama"), files(host, "llama"), 2.0, **SMALL), 2)
        layer = host.leading_layers(cache)[0]
        left = [weakref.ref(x) for x in (layer.store, layer.plan)]
        del cache, layer
        assert [x() for x in left] == [None, None]
    finally:
        gc.enable()


def test_prompts_are_held_by_the_same_codecs_at_all_bits(host, files):
    caches = [
        read(host, host.make_prompt_cache(host.model("llama"), files(host, "llama"), b, **SMALL), 2) for b in (2, 3)
    ]
    first, second = (host.leading_layers(cache)[0].store for cache in caches)
    assert first.codec is not second.codec and first.staging is second.staging


def test_the_profile_is_read_again_where_it_is_needed(host, files, tmp_path):
    """A prompt that comes in pieces needs codecs that were not made yet; they are those of a profile that stayed."""
    path = host.profile("llama").save(tmp_path / "p.safetensors")
    kept = Profile.load(path)
    expected = read(host, host.make_prompt_cache(host.model("llama"), kept, 2.0, **SMALL), 3)
    cache = read(host, host.make_prompt_cache(host.model("llama"), path, 2.0, **SMALL))
    read(host, cache, 3), read(host, expected)
    gone = host.make_prompt_cache(host.model("llama"), path, 2.5, **SMALL)
    read(host, gone)
    other = host.calibrate(host.model("llama"), tokens=512, document=512)
    shared_codecs._made.clear()
    other.save(path)
    layer = host.leading_layers(gone)[0]
    layer.plan._codecs.clear()
    with pytest.raises(UsageError, match="found another at"):
        layer.plan.codecs(host.ops, host.backend.host.device(host.model("llama")))


def test_the_second_cache_is_made_in_no_time(host, files):
    """Nothing is read, planned or made anew: 20 ms on a model of 135M parameters."""
    path = files(host, "llama")
    first = read(host, host.make_prompt_cache(host.model("llama"), path, 2.0, **SMALL))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        second = host.make_prompt_cache(host.model("llama"), path, 2.0, **SMALL)
        seconds.append(time.perf_counter() - start)
    assert host.leading_layers(first)[0].plan is host.leading_layers(second)[0].plan
    assert min(seconds) < 0.02


def test_a_changed_file_and_a_changed_profile_are_other_profiles(host, tmp_path):
    model, path = host.model("llama"), tmp_path / "p.safetensors"
    host.profile("llama").save(path)
    profile = Profile.load(path)
    hashes = []
    caches = [host.make_prompt_cache(model, path, 2.0), host.make_prompt_cache(model, profile, 2.0)]
    other = host.calibrate(model, tokens=512, document=512, name="another")
    other.save(path)
    profile.basis_sets = other.basis_sets
    caches += [host.make_prompt_cache(model, path, 2.0), host.make_prompt_cache(model, profile, 2.0)]
    hashes = [host.leading_layers(cache)[0].plan.hash for cache in caches]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_threads_make_codecs_once(host, files, monkeypatch):
    made, path = [], files(host, "llama")
    plan_class = type(host.leading_layers(host.make_prompt_cache(host.model("llama"), path, 2.0))[0].plan)
    gc.collect()
    make = plan_class._made_codecs

    def counted(self, *args):
        made.append(self)
        time.sleep(0.05)
        return make(self, *args)

    monkeypatch.setattr(plan_class, "_made_codecs", counted)
    caches: list = []
    device = host.backend.host.device(host.model("llama"))

    def work():
        cache = host.make_prompt_cache(host.model("llama"), path, 2.0, **SMALL)
        caches.append(host.leading_layers(cache)[0].plan.codecs(host.ops, device))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and all(codecs is caches[0] for codecs in caches) and len(caches) == 4


def test_every_method_tells_its_parts_again(host):
    """A plan that a cache has can be made again by what it keeps of it."""
    from spectral_kv_core.codecs.registry import make_plan

    profile = host.profile("llama")
    for name, bits in BITS.items():
        plan = make_plan(profile.shape, profile if METHODS[name].profile_set else None, name, bits)
        assert plan.remake(plan.profile).hash == plan.hash
