"""Encode chat turns to token ids, in serving and in training alike, so that what was written stays text.

A tokenizer reads the name of a control token wherever it stands. The names that a chat template or a prompt format
writes are meant; one that a turn holds is text: it is cut behind its first character, and the pieces are tokenised one
after another. A text without such names is tokenised whole, as ever.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapters_store.format.manifest import PromptFormat, Turn

ASSISTANT = "assistant"


class ControlTextError(ValueError):
    """A text becomes control tokens whatever is done: the tokenizer makes their names of other characters."""


@dataclass(frozen=True)
class Rendered:
    """Texts to tokenise one after another; `has_special`: with the tokenizer's own special tokens around them."""

    pieces: tuple[str, ...]
    has_special: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole text in UTF-8."""
        return sum(len(piece.encode("utf-8", "surrogatepass")) for piece in self.pieces)


class TurnEncoder:
    """Encodes turns by a base's tokenizer, of transformers, and its chat template.

    Control tokens are the special ones, and those that are not special and stand in the chat template. The latter have
    a text in answers, so in an assistant's turn their names are tokens again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        template = str(tokenizer.chat_template or "")
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        named = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content.strip() and token.content in template
        }
        self._special_names, self._names = _pattern(special), _pattern({**special, **named})
        self._control_ids = {*special.values(), *named.values()} - {tokenizer.unk_token_id}

    def render(self, turns: Sequence[Turn], prompt_format: PromptFormat | None) -> Rendered:
        """Write (role, text) turns as a prompt: in an adapter's format, else by the base's chat template.

        Raises `jinja2.TemplateError` for turns that the template refuses.
        """
        if prompt_format is not None:
            return Rendered(tuple(self._join(prompt_format.parts(turns))), True)
        mark = f"\ue000{secrets.randbelow(10**18):018}\ue000"  # that no turn can hold
        messages = [{"role": role, "content": mark.join(self._cut(text, role))} for role, text in turns]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Rendered(tuple(text.split(mark)), False)

    def lead(self, prompt_format: PromptFormat | None) -> str:
        """The text between a prompt of turns and its answer, which is no part of the answer."""
        return self._template_lead if prompt_format is None else prompt_format.lead

    @cached_property
    def _template_lead(self) -> str:
        """The white space that the chat template writes between the call for an answer and the answer."""
        template, turns = self._tokenizer.apply_chat_template, [{"role": "user", "content": "a"}]
        answered = [*turns, {"role": ASSISTANT, "content": "answer"}]
        try:
            prompt = template(turns, tokenize=False, add_generation_prompt=True)
            whole = template(answered, tokenize=False, add_generation_prompt=False)
        except Exception:  # noqa: BLE001 - a template may refuse anything, or there is none
            return ""
        lead: str = whole.removeprefix(prompt).partition("answer")[0]
        return lead if whole.startswith(prompt) and not lead.strip() else ""

    def render_text(self, text: str, role: str, *, has_special: bool) -> Rendered:
        """Render what a role wrote, by itself."""
        return Rendered(tuple(self._cut(text, role)), has_special)

    def encode(self, rendered: Rendered) -> list[int]:
        """Return the tokens of a rendered text. Raises `ControlTextError`."""
        first, *rest = rendered.pieces
        bare, more = self._ids(first), self._continued(rest) if rest else []
        num_names = sum(len(self._names.findall(piece)) for piece in rendered.pieces)
        if sum(token in self._control_ids for token in (*bare, *more)) > num_names:
            raise ControlTextError("the text holds characters that the base's tokenizer reads as a control token")
        if not rendered.has_special:
            return [*bare, *more]
        whole: list[int] = self._tokenizer(first, verbose=False)["input_ids"]
        ends = (at for at in range(len(bare), len(whole) + 1) if whole[at - len(bare) : at] == bare)
        end = next(ends, len(whole))
        return [*whole[:end], *more, *whole[end:]]

    def _continued(self, pieces: Sequence[str]) -> list[int]:
        """Return the tokens of texts that go on within a word, without the space that tokenizers put before a text.

        They are those behind a line's end; if that does not stay a token of its own, those of the piece alone.
        """
        different = list(dict.fromkeys(pieces))
        head = self._ids("\n")
        behind = self._tokenizer(["\n" + piece for piece in different], add_special_tokens=False)["input_ids"]
        tokens = {
            piece: ids[len(head) :] if head and ids[: len(head)] == head else self._ids(piece)
            for piece, ids in zip(different, behind, strict=True)
        }
        return [token for piece in pieces for token in tokens[piece]]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _cut(self, text: str, role: str) -> Iterator[str]:
        """Cut a turn's text behind the first character of each control token's name."""
        names = self._special_names if role == ASSISTANT else self._names
        return _pieces(text, (begin + 1 for begin, _ in _occurrences(names, text)))

    def _join(self, parts: Iterable[tuple[str, str | None]]) -> Iterator[str]:
        """Join a format's parts, and cut the names that a turn has a part in."""
        spans, texts, at = list[tuple[int, int, str]](), list[str](), 0
        for text, role in parts:
            texts.append(text)
            spans += [] if role is None else [(at, at + len(text), role)]
            at += len(text)
        joined, ends = "".join(texts), [end for _, end, _ in spans]
        cuts = list[int]()
        for begin, end in _occurrences(self._names, joined):
            number = bisect_right(ends, begin)  # of the first span that ends behind the name's beginning
            if number < len(spans) and spans[number][0] < end and self._is_cut(joined[begin:end], spans[number][2]):
                cuts.append(begin + 1)
        return _pieces(joined, cuts)

    def _is_cut(self, name: str, role: str) -> bool:
        return role != ASSISTANT or self._special_names.fullmatch(name) is not None


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Match any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _occurrences(names: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of every name in a text, also of those that overlap."""
    at = 0
    while (found := names.search(text, at)) is not None:
        yield found.span()
        at = found.start() + 1


def _pieces(text: str, cuts: Iterable[int]) -> Iterator[str]:
    begin = 0
    for cut in cuts:
        yield text[begin:cut]
        begin = cut
    yield text[begin:]
