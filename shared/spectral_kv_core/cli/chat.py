"""`spectralkv chat`: a conversation on the terminal, from one compressed cache that is kept across turns."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from ..benchmark.footprint import parse_bytes
from ..cache.prompt_cache_file import PromptFile
from ..cache.request import CacheRequest
from ..errors import UsageError
from ..hosts.backends import load_backend
from ..hosts.chat_template import checked_text, encode_messages, has_template, opening_message
from ..planning.methods import DEFAULT_METHOD, Method
from ..profile.profile import Profile
from ..serving.conversation import Conversation, Event, Speaker
from ..serving.prompt_caches import PromptCaches
from ..serving.sampling import Sampler
from . import tables
from .cache_options import (
    add_cache_options,
    live_method,
    open_prompt_file,
    profile_of,
    request_of,
    with_system_prompt,
)
from .options import add_profile_option, add_sampling_options, check_output, model_options, model_path
from .output import printable

NAME, HELP = "chat", "talk to a model on the terminal, from a compressed cache"
PARENTS = (model_options,)
COMMANDS = "/reset begins anew, /bytes tells the size, /save PATH stores the cache, /quit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="system prompt")
    add("--raw", action="store_true", help="no chat template around what is said")
    add("--max-tokens", type=int, default=512, help="tokens of an answer at most (default %(default)s)")
    add_sampling_options(parser)
    add(
        "--memory-limit", metavar="SIZE", help="bytes that the cache may take: 512MiB, 2GB; at the limit an answer ends"
    )
    add("--prompt-cache-file", metavar="FILE", help="go on from a prompt stored by cache-prompt, or by /save")
    add_profile_option(parser)
    add_cache_options(parser)


def run(args: argparse.Namespace) -> dict:
    """Talk until the input ends; then say what the cache holds."""
    if args.max_tokens < 1:
        raise UsageError(f"Expected --max-tokens of at least 1, received {args.max_tokens}.")
    limit = parse_bytes(args.memory_limit) if args.memory_limit else None
    stored = open_prompt_file(args) if args.prompt_cache_file else None
    if stored is not None and (args.raw or args.system):
        raise UsageError(
            "Expected no --raw and no --system with --prompt-cache-file, whose prompt says which template it is in."
        )
    sampler = Sampler(args.temperature, args.top_p, args.seed)
    name, speaker, begin = _speaker(args, stored)
    raw = args.raw or not has_template(speaker.tokenizer)
    if stored is None and raw and args.system:
        raise UsageError("Expected a chat template for --system, the model has none, or --raw was given.")
    opening = _opening(stored, speaker.tokenizer) if stored is not None else Opening(raw, _system(args))
    chat = Chat(speaker, sampler, opening, limit, args.max_tokens, quiet=args.json)
    if stored is not None:
        chat.go_on_from(begin(), stored)
    chat.talk()
    size = chat.conversation.measure()
    return {
        "backend": name,
        "model": args.model,
        "messages": chat.messages,
        "tokens": len(chat.conversation.tokens),
        "cache_bytes": int(size),
        "dense_bytes": size.dense_nbytes,
        "compression": size.compression,
    }


def _system(args: argparse.Namespace) -> list[dict]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _speaker(args: argparse.Namespace, stored: PromptFile | None) -> tuple[str, Speaker, Callable]:
    """The name of the backend, the model that answers, and what loads the stored cache."""
    method: Method | str | None = live_method(args, stored)
    if stored is None:
        request = request_of(args)
        profile = profile_of(args, request)
    else:
        if method is None and not stored.method.live:
            method = DEFAULT_METHOD
        given = Profile.load(args.profile) if args.profile != "auto" else None
        profile = stored.plan(given).profile or given
        bits = args.bits if args.bits is not None or method is not None else stored.bits
        live = stored.method if method in (None, "plain") and stored.method.live else method
        live = DEFAULT_METHOD if live in (None, "plain") else live
        request = CacheRequest(method=live, bits=bits, window=stored.window, sinks=stored.sinks)
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(model_path(args.model), args.dtype)

    def new_cache():
        return backend.build_cache(model, profile, with_system_prompt(request, args, tokenizer), tokenizer)

    def begin():
        return backend.load_prompt_cache(stored, model, profile, method=method, bits=args.bits)[0]

    return name, Speaker(backend, model, tokenizer, new_cache), begin


class Opening:
    """What a conversation begins with. raw: without a template. text: what the user's first message begins with."""

    def __init__(self, raw: bool, messages: list[dict], text: str = ""):
        self.raw, self.messages, self.text = raw, messages, text


def _opening(stored: PromptFile, tokenizer) -> Opening:
    """What a stored prompt says: a conversation, text without a template, or how a message begins."""
    if stored.tokens is None:
        raise UsageError(
            f"Expected a prompt cache with its token ids, {stored.path} has none. Make it with spectralkv cache-prompt."
        )
    messages = stored.metadata.get("messages")
    if isinstance(messages, list) and all(
        isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in messages
    ):
        return Opening(False, messages)
    if stored.metadata.get("raw", True):
        return Opening(True, [])
    text = opening_message(tokenizer, np.ravel(stored.tokens).tolist())
    if text is None:
        raise UsageError(f"Expected a prompt in the chat template of this model, {stored.path} has another.")
    return Opening(False, [], text)


class Chat:
    """A conversation, the commands in it, and what is said about it."""

    def __init__(
        self, speaker: Speaker, sampler: Sampler, opening: Opening, limit: int | None, max_tokens: int, quiet: bool
    ):
        """quiet: nothing is printed."""
        self.speaker, self.sampler, self.max_tokens, self.quiet = speaker, sampler, max_tokens, quiet
        self.opening, self.raw = opening, opening.raw
        self.caches = PromptCaches(speaker, limit)
        self.begin()

    def begin(self) -> None:
        """Begin anew, with the system prompt if there is one."""
        system = [message for message in self.opening.messages if message["role"] == "system"]
        self.messages, self.begun = list(system), ""
        self.conversation = Conversation(self.speaker, self.speaker.new_cache())
        self.caches.active = [self.conversation]

    def go_on_from(self, cache, stored: PromptFile) -> None:
        """Take over a stored prompt; raises UsageError where it is above the limit."""
        self.messages, self.begun = list(self.opening.messages), self.opening.text
        self.conversation = Conversation(self.speaker, cache, np.ravel(stored.tokens or []).tolist())
        self.caches.active = [self.conversation]
        size = self.conversation.measure()
        if size > self.caches.limit:
            raise UsageError(
                f"Expected a prompt cache within --memory-limit, {stored.path} holds {int(size):,} bytes. Raise it, or encode "
                "with fewer --bits."
            )

    def talk(self) -> None:
        """Answer line by line until the input ends."""
        terminal = sys.stdin.isatty() and not self.quiet
        if isinstance(sys.stdin, io.TextIOWrapper):  # a line with bytes that are no UTF-8 does not end the chat
            sys.stdin.reconfigure(errors="surrogateescape")
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # lets `input` edit a line
            self.say(COMMANDS)
        while True:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("")
                continue
            if line.startswith("/"):
                if not self.command(*line.split(None, 1)):
                    return
            elif line.strip():
                self.reply(line)

    def say(self, text: str) -> None:
        if not self.quiet:
            tables.Terminal().print(text, soft_wrap=True)

    def command(self, name: str, argument: str = "") -> bool:
        """Obey; returns whether the chat goes on."""
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.begin()
        elif name == "/bytes":
            self.tell()
        elif name == "/save":
            self.save(argument.strip())
        else:
            self.say(f"{printable(name)} is no command: {COMMANDS}. A space before it sends the line.")
        return True

    def tell(self) -> None:
        """Say how large the cache is."""
        tokens, size = len(self.conversation.tokens), self.conversation.measure()
        self.say(f"[{tokens:,} tokens: {size.described()}]")

    def save(self, path: str) -> None:
        """Store the conversation, or say why that is not possible."""
        try:
            if not path:
                raise UsageError("Expected a file name: /save PATH")
            check_output(path, "/save")
            said = {"raw": True} if self.raw else {"raw": True, "messages": self.messages}
            tokens = list(self.conversation.tokens)
            self.speaker.backend.save_prompt_cache(
                path, self.conversation.cache, tokens, model=self.speaker.model, metadata=said
            )
            self.say(f"Saved {path}")
        except (UsageError, OSError) as error:
            self.say(str(error))

    def reply(self, text: str) -> None:
        """Answer `text`, and say how large the cache is then."""
        before = list(self.messages)
        try:
            checked_text(text)
        except UsageError as error:
            self.say(str(error))
            return
        prompt = self.prompt_with(self.begun + text)
        limit = self.speaker.backend.context_limit(self.speaker.model) or len(prompt) + self.max_tokens
        if len(prompt) >= limit:
            self.messages = before
            self.say(f"The model's context of {limit:,} tokens is full. {COMMANDS}.")
            return
        answer, full = self.answer(prompt, min(self.max_tokens, limit - len(prompt)))
        if answer is None:
            self.messages = before
        else:
            self.begun = ""
            said = self.speaker.tokenizer.decode(answer, skip_special_tokens=True)
            self.messages.append({"role": "assistant", "content": said})
        if full:
            self.say(f"--memory-limit is reached, so the answer ends here. {COMMANDS}.")
        self.tell()

    def prompt_with(self, text: str) -> list[int]:
        """All tokens with `text` as the next thing that the user says."""
        self.messages.append({"role": "user", "content": text})
        tokenizer, said = self.speaker.tokenizer, self.conversation.tokens
        if self.raw:
            return [*said, *tokenizer.encode(text, add_special_tokens=not said)]
        return encode_messages(tokenizer, self.messages)

    def answer(self, prompt: list[int], most: int) -> tuple[list[int] | None, bool]:
        """Tokens of the answer as they are printed, None where there was no room for the prompt; and whether room ran out."""
        ends = self.speaker.backend.end_tokens(self.speaker.model, self.speaker.tokenizer)
        show = None if self.quiet else tables.Stream(partial(self.speaker.backend.text_stream, self.speaker.tokenizer))
        tokens: list[int] = []
        full = False
        with stopped_by_control_c() as stopped, suppress(KeyboardInterrupt):
            for event in self.conversation.answer(prompt, self.sampler, self.caches.room):
                if isinstance(event, int) and event not in ends:
                    tokens.append(event)
                    if show:
                        show.token(event)
                full = event is Event.FULL
                if full or event in ends or len(tokens) == most or stopped():
                    break
        if show and (tokens or not full):
            show.end()
        return (None if full and not tokens else tokens), full


@contextmanager
def stopped_by_control_c() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C end an answer between two steps, which leaves the cache whole; the second one ends the step too."""
    pressed: list[int] = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
