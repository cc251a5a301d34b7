"""The request for a cache: its defaults, what it refuses, and what it derives."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.cache.eviction import EVERY
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.methods import METHODS, get_method

MODEL = ToyModel()
ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def test_a_request_without_arguments_is_the_default_recipe():
    request = CacheRequest()
    assert request.recipe is get_method("spectral")
    assert (request.window, request.sinks, request.bits, request.protect, request.working_set) == (64, 4, None, (), 0)


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        CacheRequest().bits = 2.0


def test_what_is_given_as_lists_is_kept_as_tuples():
    request = CacheRequest("triattention", budget_tokens=200, protect=[[1, np.int64(9)]])
    assert request.protect == ((1, 9),) and hash(request) == hash(replace(request))
    tiers = CacheRequest("triattention+spectral", tiers=[[0.5, 4], [0.5, 1]]).tiers
    assert tiers == ((0.5, 4.0), (0.5, 1.0))
    assert CacheRequest(protect=None).protect == ()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), replace])
def test_a_copy_is_equal(again):
    request = CacheRequest("spectral-dense", 2.0, rounding_scores="nearest", working_set=1000)
    assert again(request) == request and again(request).recipe == request.recipe


def test_rounding_is_part_of_the_recipe():
    assert CacheRequest(METHODS["spectral"]).recipe.rounding == "expected-attention"
    assert CacheRequest(METHODS["spectral"], rounding_scores="knorm").recipe.rounding == "knorm"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "nothing"}, "method among"),
        ({"method": "spectral-stored"}, "live cache"),
        ({"bits": "two"}, "bits to be a number above 0, received 'two'"),
        ({"bits": 0}, "bits to be a number above 0"),
        ({"bits": float("nan")}, "bits to be a number above 0"),
        ({"bits": True}, "bits to be a number above 0"),
        ({"budget_bytes": "1GB", "max_context": 100}, "budget_bytes to be a number above 0"),
        ({"budget_bytes": 10**6}, "max_context, the tokens"),
        ({"budget_bytes": 10**6, "max_context": 2.5}, "max_context to be a number of tokens"),
        ({"bits": 2, "budget_bytes": 10**6, "max_context": 100}, "bits or budget_bytes, received both"),
        ({"window": -1}, "window to be a number of tokens"),
        ({"window": None}, "window to be a number of tokens"),
        ({"sinks": 1.5}, "sinks to be a number of tokens"),
        ({"protect": 5}, "protected spans"),
        ({"selection": ["per_head"]}, "selection among"),
        ({"method": "triattention", "budget_tokens": 200, "selection": "global"}, "selection among"),
        ({"rounding_scores": "snapkv"}, "rounding in"),
        ({"method": "kivi", "rounding_scores": "knorm"}, "rounds by scores"),
        ({"working_set": 1000}, "working_set of 0 bytes"),
        ({"method": "spectral-dense", "working_set": -1}, "working_set of 0 bytes"),
        ({"method": "spectral-dense", "working_set": "1"}, "working_set of 0 bytes"),
        ({"method": "triattention+spectral", "tiers": 4}, "shares that are quarters"),
        ({"method": "triattention+spectral", "tiers": [(0.5, 4), (0.5, 1)], "bits": 2}, "tiers alone, .* bits too"),
        ({"method": "spectral", "tiers": [(0.5, 4), (0.5, 1)]}, "scorer with spectral"),
    ],
)
def test_wrong_options_are_refused_without_a_model(options, message):
    """In one line, which names fields and no option of the command line."""
    with pytest.raises(ValueError, match=message) as error:
        CacheRequest(**options)
    assert "--" not in str(error.value) and "\n" not in str(error.value)


def test_a_method_is_a_name_or_a_recipe():
    with pytest.raises(TypeError, match="name of a method, received a list"):
        CacheRequest(["spectral"])


def test_the_plan_is_that_of_the_recipe():
    profile = toy_profile_of(MODEL)
    plan, eviction = CacheRequest(bits=2.0).plan(MODEL.shape, profile)
    assert plan.hash == make_plan(MODEL.shape, profile, METHODS["spectral"], 2.0).hash and eviction is None


def test_the_eviction_has_what_was_asked_for():
    request = CacheRequest("waveletkv+spectral", 3.0, budget_tokens=300, protect=[(5, 9)], wavelet="haar", sinks=2)
    plan, eviction = request.plan(MODEL.shape, toy_profile_of(MODEL))
    found = eviction.budget, eviction.sinks, eviction.window, eviction.protect, eviction.every, eviction.wavelet
    assert found == (300, 2, WINDOW, ((5, 9),), EVERY, "haar") and eviction.plan is plan


@pytest.mark.parametrize("backend", ["spectral_kv_torch", "spectral_kv_mlx"])
def test_make_prompt_cache_takes_every_field_with_its_default(backend):
    pytest.importorskip(backend.replace("spectral_kv_mlx", "mlx_lm").replace("spectral_kv_torch", "transformers"))
    taken = inspect.signature(import_module(backend).make_prompt_cache).parameters
    for field in fields(CacheRequest):
        assert taken[field.name].default == field.default, field.name


def test_the_defaults_of_window_and_sinks_are_written_once():
    """No other name or argument called window or sinks has a number."""
    found = []
    for folder in ("shared", "spectral_kv_torch", "spectral_kv_mlx"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found += [(path.name, name) for name, value in defaults(node) if value in (WINDOW, SINKS)]
    assert found == [("budget.py", "WINDOW"), ("budget.py", "SINKS")]


def defaults(node: ast.AST):
    """(name, number) of every window or sinks that `node` gives a number to."""
    pairs = []
    if isinstance(node, ast.arguments):
        names = [*node.posonlyargs, *node.args]
        pairs += zip([a.arg for a in names[len(names) - len(node.defaults) :]], node.defaults)
        pairs += zip([a.arg for a in node.kwonlyargs], node.kw_defaults)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs += [(t.id, v) for t, v in zip(target.elts, node.value.elts) if isinstance(t, ast.Name)]
            elif isinstance(target, ast.Name):
                pairs.append((target.id, node.value))
    elif isinstance(node, ast.keyword):
        pairs.append((node.arg, node.value))
    for name, value in pairs:
        if str(name).lower() in ("window", "sinks") and isinstance(value, ast.Constant):
            yield name, value.value
