"""mlx-lm's own commands, with compressed caches: `spectralkv mlx generate|chat|server|cache_prompt`.

Nothing of mlx-lm is copied. Its `main` runs with four of its names replaced for the time: its parser, which has our options
too; `load`, behind which the model makes our caches; and what reads and writes prompt caches.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from mlx_lm.utils import _download, load_config

from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.cli.cache_options import (
    add_cache_options,
    given_options,
    profile_of,
    request_of,
    with_system_prompt,
)
from spectral_kv_core.cli.main import OneLineParser
from spectral_kv_core.cli.options import add_profile_option, check_output, model_path
from spectral_kv_core.cli.output import in_options
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.hosts.chat_template import checked_text
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.serving.settings import MOST_PORT

from . import server
from .generation import build_cache, cache_nbytes
from .integration import config_corrections
from .limits import OURS
from .prompt_cache import load_prompt_cache, save_prompt_cache
from .server import replaced

COMMANDS = ("generate", "chat", "server", "cache_prompt")


def run(name: str, arguments: list[str]) -> None:
    """Run mlx-lm's command `name` with `arguments`, its own and ours."""
    module = importlib.import_module(f"mlx_lm.{name}")
    command = Command(name)
    places = command.places(module) | {(sys, "argv"): [f"spectralkv mlx {name}", *arguments]}
    try:
        with replaced(places):
            module.main()
    except UsageError as error:
        raise UsageError(in_options(str(error), command.args)) from error
    command.tell()


class Command:
    """What is replaced while a command of mlx-lm runs.

    args: what was given, once it is read. cache: the last that was made, or is gone on from. stored: the prompt cache
    file to go on from, or None.
    """

    args: argparse.Namespace | None = None
    request: CacheRequest
    profile: Profile | None
    stored: PromptFile | None = None
    cache: list | None = None
    model: Any = None
    raw = True

    def __init__(self, name: str):
        self.name = name

    def places(self, module: ModuleType) -> dict[tuple[Any, str], Any]:
        """Every name of `module` that is replaced, and by what."""
        command, told = self, vars(argparse)

        class Parser(OneLineParser):
            def __init__(self, *args, **options):
                super().__init__(*args, **options, prog=f"spectralkv mlx {command.name}", allow_abbrev=False)

            def parse_args(self, *given):
                command.add_options(self)
                command.take(super().parse_args(*given))
                return command.args

        found = {
            (module, "argparse"): SimpleNamespace(**told | {"ArgumentParser": Parser}),
            (module, "load"): partial(self.load, module.load),
        }
        if hasattr(module, "sharded_load"):
            found[module, "sharded_load"] = _refuse_shards
        if self.name == "generate":
            found[module, "load_prompt_cache"] = self.open_stored
        if self.name == "cache_prompt":
            found[module, "generate_step"] = partial(self.read, module.generate_step)
            found[module, "save_prompt_cache"] = self.save
        if self.name == "server":
            found |= server.places(module)
        return found

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add ours to mlx-lm's parser."""
        group = parser.add_argument_group("compressed cache, by spectralkv")
        add_cache_options(group)
        add_profile_option(group)

    def take(self, args: argparse.Namespace) -> None:
        """Check all that can be known before a model is loaded, and keep it."""
        self.args = args
        for theirs, ours in OURS.items():
            if getattr(args, theirs, None) is not None:
                option = ours.replace("_", "-")
                raise UsageError(
                    f"Expected no --{theirs.replace('_', '-')}, which changes no cache of spectralkv. Give --{option} instead."
                )
        for text in ("prompt", "system_prompt", "prefill_response"):
            checked_text(getattr(args, text, None) or "")
        if not 0 <= (port := getattr(args, "port", 0)) <= MOST_PORT:
            raise UsageError(f"Expected --port between 0 and {MOST_PORT}, received {port}.")
        self.request = request_of(args)
        if getattr(args, "draft_model", None) is not None and self.request.recipe.scorer is not None:
            raise UsageError(
                f"Expected no --draft-model with {self.request.recipe.name}, which drops tokens and cannot take back any."
            )
        self.profile = profile_of(args, self.request)
        file = getattr(args, "prompt_cache_file", None)
        if self.name == "cache_prompt":
            check_output(file, "--prompt-cache-file")
            if self.request.recipe.scorer is not None:
                raise UsageError(
                    f"Expected a method that keeps every token for a file, received {self.request.recipe.name}."
                )
        elif file is not None:
            self.stored = self._opened(file)
            args.model = args.model or self.stored.model

    def _opened(self, file: str) -> PromptFile:
        """Our prompt cache in `file`; raises UsageError for one of mlx-lm, and for options beside it."""
        for option in given_options(self.args):
            raise UsageError(
                f"Expected no --{option.replace('_', '-')} with --prompt-cache-file, whose cache is as it was stored."
            )
        try:
            stored = PromptFile.load(file)
        except UsageError as error:
            raise UsageError(
                f"{first_line(error)} A file of mlx-lm's own serves mlx_lm.generate; one of spectralkv is made by: spectralkv "
                "mlx cache_prompt"
            ) from None
        if len(stored.padding) > 1:
            raise UsageError(f"Expected a prompt cache of one prompt, {file} has {len(stored.padding)}.")
        return stored

    def load(self, load: Callable, name: str, *args, **options) -> tuple:
        """mlx-lm's `load`, behind which the model makes our caches; a draft model, loaded by its name alone, keeps its own."""
        if not options:
            return load(name)
        path = model_path(name)
        try:
            corrections = config_corrections(load_config(_download(path)))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"Expected a model directory or a hub id, cannot load {name!r}: {first_line(error)}"
            ) from None
        options["model_config"] = corrections | (options.get("model_config") or {})
        model, tokenizer, *rest = load(path, *args, **options)
        model.name_or_path = path
        self.raw = not tokenizer.has_chat_template
        self.prepare(model, tokenizer)
        return model, tokenizer, *rest

    def prepare(self, model, tokenizer) -> None:
        """Let `model` make our caches; raises UsageError for what it cannot have, before a prompt is read."""
        self.model = model
        if self.stored is not None:
            self.check_template()
            self.cache[:] = load_prompt_cache(self.stored, model, self.profile)[0]
            return
        request = with_system_prompt(self.request, self.args, tokenizer)

        def make_cache() -> list:
            self.cache = build_cache(model, self.profile, request, tokenizer)
            return self.cache

        make_cache()
        model.make_cache = make_cache

    def check_template(self) -> None:
        """Raise UsageError where the stored prompt and the one to come do not agree about the chat template."""
        raw = self.stored.metadata.get("raw", True)
        if raw != (self.raw or self.args.ignore_chat_template):
            what = "without the chat template: give --ignore-chat-template" if raw else "with the chat template"
            raise UsageError(f"Expected a prompt as the stored one, {self.stored.path} was made {what}.")

    def open_stored(self, file: str, return_metadata: bool) -> tuple[list, dict]:
        """A cache to be filled once the model is there, in place of what mlx-lm reads from a file of its own."""
        self.cache = [None]
        return self.cache, {"tokenizer_config": "{}", "model": self.args.model}

    def read(self, generate_step: Callable, prompt, model, **options):
        """mlx-lm's `generate_step`; the tokens of the prompt go into the file."""
        self.tokens = prompt.tolist()
        return generate_step(prompt, model, **options)

    def save(self, file: str, cache: list, metadata: dict) -> None:
        """Write our file in place of mlx-lm's."""
        save_prompt_cache(file, cache, self.tokens, model=self.model, metadata={"raw": self.raw})

    def tell(self) -> None:
        """Say what the last cache holds, in a line on standard error: standard output is mlx-lm's."""
        size = cache_nbytes(self.cache) if self.cache and self.name != "server" else 0
        if size:
            print(f"spectralkv: the cache holds {size.described()}", file=sys.stderr)


def _refuse_shards(*args, **options):
    raise UsageError(
        "Expected one process, received several: compressed caches are not shared out yet. Run mlx-lm's own."
    )
