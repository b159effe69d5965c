"""Parse an answer as it comes into reasoning, content and calls of tools.

What is no call stays content, and nothing is lost but white space beside calls and reasoning. A call is given out once
it is whole: one that breaks off, names no given function, or has arguments that are no JSON object is content.
"""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapters_store.tools.formats import ARGS, ToolFormat
from adapters_store.tools.readers import CALL_ID, READERS, CallText, Functions, openings
from adapters_store.tools.source import NoCallError, Reading, TextSource, overlap
from adapters_store.tools.turns import Tools

MAX_MISSES = 16  # openings of an answer that turned out to be no call; further ones are not looked at
BETWEEN = " \t\r\n;"  # bare calls
SHORT_ID = string.ascii_letters + string.digits


class AnswerText(NamedTuple):
    """A piece of the answer's content or of its reasoning."""

    kind: Literal["content", "reasoning"]
    text: str


class CallPart(NamedTuple):
    """A whole call, the `number`-th of the answer from 0 on; `arguments` is the text of a JSON object."""

    number: int
    id: str
    name: str
    arguments: str


Part = AnswerText | CallPart


def said_in(parts: Sequence[Part], kind: Literal["content", "reasoning"]) -> str:
    """Join the text of one kind in parts of an answer."""
    return "".join(part.text for part in parts if isinstance(part, AnswerText) and part.kind == kind)


@dataclass(frozen=True)
class AnswerFormat:
    """The parts that an answer may have: calls of `functions` in a format, and reasoning between two texts.

    With `is_reasoning` it begins within the reasoning; without `is_parallel` it ends with its first call.
    """

    tools: ToolFormat | None = None
    functions: Functions = field(default_factory=dict)
    reasoning: tuple[str, str] | None = None
    is_reasoning: bool = False
    is_parallel: bool = True

    @classmethod
    def of(
        cls,
        form: ToolFormat | None,
        tools: Tools,
        reasoning: tuple[str, str] | None,
        prompt: str,
        is_parallel: bool = True,
    ) -> AnswerFormat:
        """The parts of an answer to the text of a prompt, which may open the reasoning at its end."""
        is_reasoning = reasoning is not None and prompt.rstrip().endswith(reasoning[0])
        return cls(form, {tool["name"]: tool["parameters"] for tool in tools}, reasoning, is_reasoning, is_parallel)

    @property
    def marks(self) -> frozenset[str]:
        """The texts of the format that may be special tokens, which answers else do not show."""
        calls = (*openings(self.tools), self.tools.texts.call_end.strip()) if self.tools else ()
        more = (ARGS, CALL_ID) if self.tools and self.tools.syntax in ("list", "named") else ()
        return frozenset({*calls, *more, *(self.reasoning or ())} - {""})


class AnswerParser:
    """Parses one answer, pushed in pieces that may be cut anywhere.

    `has_ended` says that the answer is over before the model ends it, at its only call.
    """

    def __init__(self, answer_format: AnswerFormat) -> None:
        self._format, self._source = answer_format, TextSource()
        self._parts: list[Part] = []
        self._space = ""  # of the current kind, until it is known what follows
        self._is_trimmed = False  # behind a call or reasoning white space is dropped
        self.num_calls, self.has_ended = 0, False
        self._parsing = self._parse()

    def push(self, text: str) -> list[Part]:
        """Give the parts that are certain after some more text."""
        self._source.push(text)
        return self._go_on()

    def finish(self) -> list[Part]:
        """Give what was held back, at the end of the answer."""
        self._source.is_over = True
        return self._go_on()

    def _go_on(self) -> list[Part]:
        next(self._parsing, None)
        parts, self._parts = self._parts, []
        return parts

    def _parse(self) -> Reading[None]:
        if self._format.reasoning is not None:
            yield from self._reasoning(*self._format.reasoning)
        if (form := self._format.tools) is not None:
            yield from (self._bare_calls(form) if form.is_bare else self._marked_calls(form))
        if not self.has_ended:
            yield from self._text("content", ())
            self._flush("content")

    def _reasoning(self, begin: str, end: str) -> Reading[None]:
        """Read the reasoning that the answer begins with, if it does."""
        source = self._source
        yield from source.skip()
        if not (yield from source.take(begin)) and not self._format.is_reasoning:
            source.at = 0
            return
        self._is_trimmed = True
        if (yield from self._text("reasoning", (end,))):
            source.at += len(end)
        self._space, self._is_trimmed = "", True

    def _marked_calls(self, form: ToolFormat) -> Reading[None]:
        """Read content with calls anywhere in it, up to the answer's end."""
        marks, misses, skipped = openings(form), 0, 0
        while not self.has_ended and misses < MAX_MISSES and (yield from self._text("content", marks, skipped)):
            is_call = yield from self._try_calls(form)
            misses, skipped = misses + (not is_call), int(not is_call)

    def _bare_calls(self, form: ToolFormat) -> Reading[None]:
        """Read the calls that the answer begins with, if it does."""
        begin = self._source.at
        yield from self._source.skip()
        while not self.has_ended and (yield from self._try_calls(form)):
            begin = self._source.at
            yield from self._source.skip(BETWEEN)
        self._source.at = begin

    def _try_calls(self, form: ToolFormat) -> Reading[bool]:
        """Read calls here, or stay here if there are none."""
        begin = self._source.at
        try:
            calls = yield from READERS[form.syntax](self._source, form, self._format.functions)
        except NoCallError:
            self._source.at = begin
            return False
        self._give(calls if self._format.is_parallel else calls[:1], form)
        return True

    def _give(self, calls: Sequence[CallText], form: ToolFormat) -> None:
        self._space, self._is_trimmed, self.has_ended = "", True, not self._format.is_parallel
        for call in calls:
            self._parts.append(CallPart(self.num_calls, call_id(form), *call))
            self.num_calls += 1

    def _text(self, kind: Literal["content", "reasoning"], marks: Sequence[str], skipped: int = 0) -> Reading[bool]:
        """Give out text up to one of the marks, at the earliest `skipped` characters on; False at the answer's end."""
        source = self._source
        while True:
            found = [at for mark in marks if (at := source.text.find(mark, source.at + skipped)) >= 0]
            end = min(found, default=len(source.text) - max((overlap(source.text, mark) for mark in marks), default=0))
            end = max(end, min(source.at + skipped, len(source.text)))
            self._put(kind, source.text[source.at : end])
            skipped = max(0, skipped - end + source.at)
            source.at = end
            if found:
                return True
            source.forget()
            if not (yield from source.more()):
                self._put(kind, source.text[source.at :])
                source.at = len(source.text)
                return False

    def _put(self, kind: Literal["content", "reasoning"], text: str) -> None:
        """Give out text, without the white space at its end: what follows decides about that."""
        text = self._space + text
        if self._is_trimmed:
            text = text.lstrip()
        self._space = text[len(text.rstrip()) :]
        if text := text.rstrip():
            self._is_trimmed = False
            self._parts.append(AnswerText(kind, text))

    def _flush(self, kind: Literal["content", "reasoning"]) -> None:
        if self._space and not self._is_trimmed:
            self._parts.append(AnswerText(kind, self._space))


def call_id(form: ToolFormat) -> str:
    """Draw the id of a call, in the length that the format's template takes."""
    if form.has_short_ids:
        return "".join(secrets.choice(SHORT_ID) for _ in range(9))
    return f"call_{uuid.uuid4().hex[:24]}"
