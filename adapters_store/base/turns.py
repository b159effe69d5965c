"""Encode chat turns to token ids, in serving and in training alike, so that what was written stays text.

A tokenizer reads the name of a control token wherever it stands. The names that a chat template or a prompt format
writes are meant; one that a turn holds is text: it is cut behind its first character, and the pieces are tokenised one
after another. So is one that begins in a turn and ends in what is written around it, or the other way. A text without
such names is tokenised whole, as ever.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any

from adapters_store.format.manifest import PromptFormat, Turn
from adapters_store.tools.formats import ToolFormat
from adapters_store.tools.turns import AnyTurn, Tools, ToolTurn, functions_of, messages_of, plain_turns

ASSISTANT = "assistant"
Span = tuple[int, int, str]  # of a turn in a text: where it begins and ends, and its role


class ControlTextError(ValueError):
    """A text becomes control tokens whatever is done: the tokenizer makes their names of other characters."""


class ToolsRefusedError(ValueError):
    """Neither the base's chat template nor a tool format can write these tools; the sentence is for users."""


class AnswerRefusedError(ValueError):
    """A chat template writes an answer so that it cannot be told from its prompt; the sentence is for users."""


@dataclass(frozen=True)
class Rendered:
    """Texts to tokenise one after another; `has_special`: with the tokenizer's own special tokens around them."""

    pieces: tuple[str, ...]
    has_special: bool


class TurnEncoder:
    """Encodes turns by a base's tokenizer, of transformers, and its chat template.

    Control tokens are the special ones, and those that are not special and stand in the chat template. The latter have
    a text in answers, so in an assistant's turn their names are tokens again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.template = template = str(tokenizer.chat_template or "")
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        named = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content.strip() and token.content in template
        }
        self._special_names, self._names = ControlNames(special), ControlNames({**special, **named})
        self._control_ids = {*special.values(), *named.values()} - {tokenizer.unk_token_id}

    def render(
        self,
        turns: Sequence[AnyTurn],
        prompt_format: PromptFormat | None,
        tools: Tools = (),
        tool_format: ToolFormat | None = None,
    ) -> Rendered:
        """Write turns as a prompt: in an adapter's format, else by the base's chat template.

        Tools, their calls and results are written in the tool format, or else by the template. Raises
        `jinja2.TemplateError` for turns that the template refuses, `ToolsRefusedError` and `ControlTextError`.
        """
        written, tools = self._writable(turns, prompt_format, tools, tool_format)
        if prompt_format is not None:
            return Rendered(tuple(self._join(prompt_format.parts([turn[:2] for turn in written]))), True)
        text, cuts = self._joined(written, tools, is_prompt=True)
        return Rendered(tuple(_pieces(text, sorted(cuts))), False)

    def render_answer(
        self, turns: Sequence[AnyTurn], answer: ToolTurn, tools: Tools, tool_format: ToolFormat | None
    ) -> Rendered:
        """Write the answer to turns as a model is to generate it, without what stands before and behind every answer.

        Raises `AnswerRefusedError` if the chat template writes the prompt otherwise before this answer, and what
        `render` raises.
        """
        if tool_format is not None:
            ((_, text),) = plain_turns([answer], (), tool_format)
            return self.render_text(text, ASSISTANT, has_special=False)
        written, tools = self._writable([*turns, answer], None, tools, None)
        prompt, _ = self._joined(written[:-1], tools, is_prompt=True)
        whole, cuts = self._joined(written, tools, is_prompt=False)
        lead, tail = self._template_ends
        if not whole.startswith(prompt) or not whole.endswith(tail):
            raise AnswerRefusedError("the base's chat template does not write this answer behind its prompt")
        begin, end = len(prompt), len(whole) - len(tail)
        begin += len(lead) if whole.startswith(lead, begin) else 0
        inside = sorted(cut - begin for cut in cuts if begin < cut < end)
        return Rendered(tuple(_pieces(whole[begin:end], inside)), False)

    @cached_property
    def takes_tools(self) -> bool:
        """Tell whether the chat template writes tools: with one a prompt is another than without."""
        turns, tool = [ToolTurn("user", "a")], {"name": "probe", "description": "", "parameters": {"type": "object"}}
        try:
            return self._written(turns, (tool,), None, is_prompt=True) != self._written(turns, (), None, is_prompt=True)
        except Exception:  # noqa: BLE001 - a template may refuse anything, or there is none
            return False

    def _writable(
        self,
        turns: Sequence[AnyTurn],
        prompt_format: PromptFormat | None,
        tools: Tools,
        tool_format: ToolFormat | None,
    ) -> tuple[list[ToolTurn], Tools]:
        """Give turns and tools as the prompt format or the template takes them. Raises `ToolsRefusedError`."""
        full = [ToolTurn(*turn) for turn in turns]
        if not tools and not any(turn.needs_tools for turn in full):
            return full, ()
        if tool_format is not None:
            return [ToolTurn(*turn) for turn in plain_turns(full, tools, tool_format)], ()
        if prompt_format is not None:
            raise ToolsRefusedError(
                "the adapter's prompt format writes no tools, and its manifest names no tool format"
            )
        if not self.takes_tools:
            raise ToolsRefusedError("the base's chat template writes no tools, and no tool format is named")
        return full, tools

    def _joined(self, turns: Sequence[ToolTurn], tools: Tools, *, is_prompt: bool) -> tuple[str, set[int]]:
        """Write turns and tools by the chat template; give the text, and the places to cut it at."""
        marks, fields = Marks(secrets.randbelow(10**18)), list[Turn]()

        def collect(role: str, text: str) -> str:
            fields.append((role, text))
            return text

        messages_of(turns, collect)
        functions_of(tools, collect)
        contents = [marks.cut.join(self._cut(text, role)) for role, text in fields]

        def write(texts: Sequence[str]) -> str:
            return self._written(turns, tools, texts, is_prompt=is_prompt)

        joined, cuts = marks.without_cuts(write(contents))
        if open_fields := [number for number, content in enumerate(contents) if self._names.is_part_of(content)]:
            spans = self._spans(write, fields, contents, open_fields, marks, joined)
            cuts |= {*self._cuts(joined, spans)}
        return joined, cuts

    def _written(self, turns: Sequence[ToolTurn], tools: Tools, texts: Sequence[str] | None, *, is_prompt: bool) -> str:
        """Write turns and tools by the chat template, with `texts` in the place of their own if they are given."""
        replaced = None if texts is None else iter(texts)

        def put(_role: str, text: str) -> str:
            return text if replaced is None else next(replaced)

        messages = messages_of(turns, put)
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=functions_of(tools, put), tokenize=False, add_generation_prompt=is_prompt
        )
        return text

    def _spans(
        self,
        write: Callable[[Sequence[str]], str],
        fields: Sequence[Turn],
        contents: Sequence[str],
        which: Sequence[int],
        marks: Marks,
        joined: str,
    ) -> list[Span]:
        """Find the places of some fields, as a turn's text, in the text of all, by writing it again with marks around.

        The marks stand around a field's white space or, for a template that takes that off, within it. If the template
        writes another text then, as it looks at a field's ends, the places are not known: there are none if no such
        field can stand beside a name, else `ControlTextError` is raised.
        """
        for is_trimmed in (False, True):
            marked = [
                marks.around(content, number, is_trimmed) if number in which else content
                for number, content in enumerate(contents)
            ]
            written = marks.without_cuts(write(marked))[0]
            found = marks.spans(written)
            if found is not None and found[0] == joined:
                return [(begin, end, fields[number][0]) for begin, end, number in found[1]]
        forms = {form for number in which for form in (fields[number][1], fields[number][1].strip()) if form}
        for begin, end in self._names.occurrences(joined):
            if any(form in joined[max(0, begin - len(form) + 1) : end + len(form) - 1] for form in forms):
                raise ControlTextError("a turn may complete the name of a control token that the chat template begins")
        return []

    def lead(self, prompt_format: PromptFormat | None) -> str:
        """The text between a prompt of turns and its answer, which is no part of the answer."""
        return self._template_ends[0] if prompt_format is None else prompt_format.lead

    @cached_property
    def _template_ends(self) -> tuple[str, str]:
        """The white space that the chat template writes between the call for an answer and it, and the text behind."""
        turns = [ToolTurn("user", "a"), ToolTurn(ASSISTANT, "answer")]
        try:
            prompt = self._written(turns[:1], (), None, is_prompt=True)
            whole = self._written(turns, (), None, is_prompt=False)
        except Exception:  # noqa: BLE001 - a template may refuse anything, or there is none
            return "", ""
        lead, _, tail = whole.removeprefix(prompt).partition("answer")
        return lead if whole.startswith(prompt) and not lead.strip() else "", tail

    def render_text(self, text: str, role: str, *, has_special: bool) -> Rendered:
        """Render what a role wrote, by itself."""
        return Rendered(tuple(self._cut(text, role)), has_special)

    def encode(self, rendered: Rendered) -> list[int]:
        """Return the tokens of a rendered text. Raises `ControlTextError`."""
        first, *rest = rendered.pieces
        bare, more = self._ids(first), self._continued(rest) if rest else []
        num_names = sum(map(self._names.count, rendered.pieces))
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
        return _pieces(text, self._cuts(text, [(0, len(text), role)]))

    def _join(self, parts: Iterable[tuple[str, str | None]]) -> Iterator[str]:
        """Join a format's parts, and cut the names that a turn has a part in."""
        spans, texts, at = list[Span](), list[str](), 0
        for text, role in parts:
            texts.append(text)
            spans += [] if role is None else [(at, at + len(text), role)]
            at += len(text)
        joined = "".join(texts)
        return _pieces(joined, self._cuts(joined, spans))

    def _cuts(self, text: str, spans: Sequence[Span]) -> Iterator[int]:
        """Give a cut behind the first character of each control token's name that a turn has a part in."""
        ends = [end for _, end, _ in spans]
        for begin, end in self._names.occurrences(text):
            behind = spans[bisect_right(ends, begin) :]  # from the first that ends behind the name's beginning
            roles = [role for at, _, role in takewhile(lambda span, end=end: span[0] < end, behind)]  # type: ignore[misc]
            if any(self._is_cut(text[begin:end], role) for role in roles):
                yield begin + 1

    def _is_cut(self, name: str, role: str) -> bool:
        return role != ASSISTANT or name in self._special_names


class ControlNames:
    """Names of control tokens, to be found in a text."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")  # the longest first
        self._beginnings = tuple({name[:at] for name in self._names for at in range(1, len(name))})
        self._endings = tuple({name[at:] for name in self._names for at in range(1, len(name))})

    def __contains__(self, text: str) -> bool:
        return text in self._names

    def count(self, text: str) -> int:
        """Count the names in a text, those that overlap an earlier one left out."""
        return len(self._pattern.findall(text))

    def occurrences(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of every name in a text, also of those that overlap."""
        at = 0
        while (found := self._pattern.search(text, at)) is not None:
            yield found.span()
            at = found.start() + 1

    def is_part_of(self, text: str) -> bool:
        """Tell whether a text, with or without the white space around it, could make a name with what is beside it."""
        forms = {text, text.strip()} - {""}
        return any(
            form.startswith(self._endings)
            or form.endswith(self._beginnings)
            or any(form in name for name in self._names)
            for form in forms
        )


@dataclass(frozen=True)
class Marks:
    """Marks in the text of turns, which go through a chat template with it; no turn can hold them by chance."""

    number: int

    @property
    def cut(self) -> str:
        """The mark of a place to cut."""
        return f"\ue000{self.number:018}\ue000"

    @property
    def _end(self) -> str:
        """The mark behind a text."""
        return f"\ue002{self.number:018}\ue002"

    def around(self, text: str, turn: int, is_trimmed: bool) -> str:
        """Put marks around a turn's text, or around what is left of it without the white space at its ends."""
        core = text.strip() if is_trimmed else text
        before, _, after = text.partition(core) if core else (text, "", "")
        return f"{before}\ue001{self.number:018}.{turn}\ue001{core}{self._end}{after}"

    def without_cuts(self, text: str) -> tuple[str, set[int]]:
        """Return a text without the marks of cuts, and the places of those."""
        pieces = text.split(self.cut)
        whole = "".join(pieces)
        if whole.count(f"{self.number:018}") > whole.count(f"\ue001{self.number:018}.") + whole.count(self._end):
            raise ControlTextError("the chat template writes the name of a control token in another form")
        return whole, {*accumulate(map(len, pieces[:-1]))}

    def spans(self, text: str) -> tuple[str, list[tuple[int, int, int]]] | None:
        """Return a text without the marks around turns, and where each turn (begin, end, number) stands in it.

        Returns None if the template took one of a pair of marks away.
        """
        whole, *marked = text.split(f"\ue001{self.number:018}.")
        spans = list[tuple[int, int, int]]()
        for piece in marked:
            turn, _, rest = piece.partition("\ue001")
            core, end, after = rest.partition(self._end)
            if not end:
                return None
            spans.append((len(whole), len(whole) + len(core), int(turn)))
            whole += core + after
        return None if f"{self.number:018}" in whole else (whole, spans)


def _pieces(text: str, cuts: Iterable[int]) -> Iterator[str]:
    begin = 0
    for cut in cuts:
        yield text[begin:cut]
        begin = cut
    yield text[begin:]
