"""Text to tokens and back. An answer's text is always the join of its stream's pieces, so the two cannot differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from adapters_store.artifact import PromptFormat

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
MAX_CHARACTER_BYTES = 4
MAX_HELD_TOKENS = 32  # bytes that never become a character are given up after so many tokens


class Tokenizer:
    """A base's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = _import_alone().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        added = self._tokenizer.added_tokens_decoder
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.encode("")  # the first call may set up the tokenizer, which threads must not do at once

    @property
    def has_chat_template(self) -> bool:
        """Whether the base says how chat turns are written."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the tokenizer's own special tokens around it."""
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]  # or it logs that a prompt is long
        return ids

    def encode_chat(self, turns: list[tuple[str, str]], prompt_format: PromptFormat | None) -> list[int]:
        """Tokens of (role, text) turns: by the adapter's plain prompt format, else by the base's chat template."""
        if prompt_format is not None:
            return self.encode(prompt_format.render(turns))
        messages = [{"role": role, "content": text} for role, text in turns]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def is_special(self, token_id: int) -> bool:
        """Whether a token has no text of its own, as the end of a sequence."""
        return token_id in self._special

    def decode(self, token_ids: list[int], skip_special: bool = True) -> str:
        """Text of tokens."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text


def _import_alone() -> ModuleType:
    """transformers; where nobody has imported it yet, as it is on a machine without torch.

    With torch it imports all that models may need, and a tokenizer does not: 160 MB, and a second of a start.
    """
    if "transformers" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
        with _hidden("torch"):
            import transformers

            transformers.is_torch_available()  # it asks once, and remembers
    return import_module("transformers")


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Whoever looks for this module meanwhile finds none."""
    kept = sys.modules.pop(name, None)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept


class TextStream:
    """Tokens in, text out: whole characters only, and never a part of a stop text.

    Tokens are decoded in a short window behind the last whole character, so that a long answer costs no more per token
    than a short one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._window: list[int] = []  # tokens since the one before the last that was read
        self._num_read = 0  # how many of the window are in the text already
        self._held = ""  # text that may be the beginning of a stop text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token. Sets `is_stopped` where a stop text is complete."""
        if self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        before = self._tokenizer.decode(self._window[: self._num_read])
        after = self._tokenizer.decode(self._window)
        end = len(self._window)
        if after.endswith(REPLACEMENT):
            if end - self._num_read < MAX_HELD_TOKENS:
                return ""
            end = self._last_whole(after)
            after = self._tokenizer.decode(self._window[:end])
        self._window, self._num_read = self._window[self._num_read :], end - self._num_read
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """What is left at the end of the answer."""
        before = self._tokenizer.decode(self._window[: self._num_read])
        rest = self._tokenizer.decode(self._window)[len(before) :]
        self._num_read = len(self._window)
        text = self._release(rest)
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _last_whole(self, text: str) -> int:
        """Where the window's `text` can be cut, so that what may be the beginning of a character stays behind."""
        window, decode = self._window, self._tokenizer.decode
        cuts = range(len(window) - MAX_CHARACTER_BYTES + 1, len(window))
        return next((cut for cut in cuts if decode(window[:cut]) + decode(window[cut:]) == text), len(window))

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)[0]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
