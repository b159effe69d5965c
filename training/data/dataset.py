"""Data sets: rows in TRL's forms become token ids, with a line between prompt and completion.

Forms of a row (https://huggingface.co/docs/trl/dataset_formats):

* `prompt` and `completion` as texts (or the columns that the user names), put through the template;
* `prompt` and `completion` as lists of turns, or `messages`: the last turn, the assistant's, is the completion and
  the base's chat template renders the turns before it. Such rows may have `tools`, and call them (see `chat`).

Prompt and completion are tokenised apart and joined, because that is what serving does: the prompt's tokens are
given and the completion's are generated after them. The completion ends with the tokenizer's EOS. The name of a control
token in a row is text, as in a turn that is served; in a template it is the token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from adapters_store.base.turns import ASSISTANT, ControlTextError, Rendered, TurnEncoder
from adapters_store.format.manifest import PromptFormat, ToolFormatName, ToolTexts
from adapters_store.tools.formats import to_json
from adapters_store.tools.turns import AnyTurn
from training.base import Base
from training.data.chat import TOOLS, Chat, check_text, read_chat, render_chat, tool_format_named
from training.data.files import digest_of, read_rows
from training.data.template import Template
from training.errors import DataError

_BUCKETED = 32  # batches that are sorted by length together: little padding, and still a shuffle


@dataclass(frozen=True)
class Columns:
    """The names of a row's fields."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"

    def has_messages(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is read by its messages; else it is by prompt and completion."""
        return self.messages in row and self.prompt not in row

    def names_read(self, row: Mapping[str, Any]) -> set[str]:
        """Return the names of the columns of a row that are read."""
        if self.has_messages(row):
            return {self.messages, TOOLS}
        return {self.prompt, self.completion} | ({TOOLS} if isinstance(row.get(self.prompt), list) else set())


@dataclass(frozen=True)
class Example:
    """A row of a data set; `line` is the line of `file` that the row begins at.

    `turns` are what the completion answers, written in `prompt_format`, or if that is None by the base's chat template.
    `chat` has all of a row with tools or reasoning, of which the completion is the content alone.
    """

    turns: tuple[AnyTurn, ...]
    completion: str
    file: Path
    line: int
    prompt_format: PromptFormat | None = None
    chat: Chat | None = None

    @property
    def learned(self) -> str:
        """Return what the row teaches, as one text."""
        calls = [] if self.chat is None else self.chat.answer.calls
        return self.completion + (to_json([call[:2] for call in calls]) if calls else "")

    @property
    def where(self) -> str:
        """File and line of the example, for sentences."""
        return f"{self.file} line {self.line}"


@dataclass(frozen=True)
class Dataset:
    """The examples of a file or folder, and the sha256 of its bytes; `is_chat` if a chat template renders them.

    `unread` are columns that nothing reads.
    """

    path: Path
    examples: tuple[Example, ...]
    digest: str
    unread: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return self.examples[0].prompt_format is None


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids of prompt + completion + EOS; the completion begins at `num_prompt`, EOS is part of it."""

    ids: tuple[int, ...]
    num_prompt: int
    line: int

    @property
    def completion(self) -> tuple[int, ...]:
        return self.ids[self.num_prompt :]


@dataclass(frozen=True)
class TrainingData:
    """The rows to train on and those to score on (`held`), as examples and as token ids.

    `tool_format` is the one in which calls of tools are written, None if the base's chat template writes them.
    """

    train: Dataset
    held: Dataset
    train_rows: list[TokenizedRow]
    held_rows: list[TokenizedRow]
    tool_format: ToolFormatName | ToolTexts | None = None

    @property
    def unread_note(self) -> str:
        """Name the columns of the rows to train on that nothing reads, in a line; empty if there are none."""
        return f"{self.train.path}: not read: {', '.join(self.train.unread)}" if self.train.unread else ""

    @property
    def has_tools(self) -> bool:
        """Whether a row to train on has tools."""
        return any(example.chat is not None and example.chat.tools for example in self.train.examples)


class RowOptions(Protocol):
    """The options of a job that say where its rows are, and how they become tokens; `max_length` is in tokens."""

    @property
    def data(self) -> Path: ...
    @property
    def eval(self) -> Path | None: ...
    @property
    def columns(self) -> Columns: ...
    @property
    def template(self) -> Template: ...
    @property
    def tool_format(self) -> str: ...
    @property
    def max_length(self) -> int: ...


def read_training_data(options: RowOptions, base: Base, seed: int) -> TrainingData:
    """Read and tokenise the rows to train on, and those to score on: of a second file, or held out of the first.

    `seed` chooses the rows that are held out. Raises `DataError`.
    """
    named = tool_format_named(options.tool_format)
    train = read_dataset(options.data, options.columns, options.template)
    check_varied(train)
    if options.eval is None:
        train, held = hold_out(train, seed)
    else:
        held = read_dataset(options.eval, options.columns, options.template)
    max_length = min(options.max_length, base.spec.max_positions)
    train_rows, held_rows = (tokenise(split, base, max_length, named) for split in (train, held))
    return TrainingData(train, held, train_rows, held_rows, named)


def read_dataset(path: Path, columns: Columns, template: Template) -> Dataset:
    """Read a file or folder whole. Raises `DataError`, naming the line, at the first row that cannot be used."""
    examples, unread = list[Example](), set[str]()
    for file, line, row in read_rows(path):
        examples.append(_example(file, line, row, columns, template))
        unread |= row.keys() - columns.names_read(row)
    if not examples:
        raise DataError(f"{path} has no rows.")
    return Dataset(path, tuple(examples), digest_of(path), tuple(sorted(unread)))


def check_varied(dataset: Dataset) -> None:
    """Raise `DataError` when all rows have one and the same answer: enough to score on, too little to learn from."""
    completions = {example.learned for example in dataset.examples}
    if len(dataset.examples) > 1 and len(completions) == 1:
        raise DataError(f"Every completion of {dataset.path} is {completions.pop()!r}: there is nothing to learn from.")


def hold_out(dataset: Dataset, seed: int, share: float = 0.1, max_rows: int = 400) -> tuple[Dataset, Dataset]:
    """Split a data set into one to train on and one to evaluate on, by the seed. Raises `DataError` below 2 rows."""
    num_held = min(max_rows, max(1, int(len(dataset.examples) * share)))
    if len(dataset.examples) <= num_held:
        raise DataError(f"{dataset.path} has too few rows to hold some out for evaluation: give a file with --eval.")
    order = random.Random(seed).sample(range(len(dataset.examples)), len(dataset.examples))  # noqa: S311 - not a secret
    parts = (sorted(order[num_held:]), sorted(order[:num_held]))
    train, held = (tuple(dataset.examples[i] for i in part) for part in parts)
    return replace(dataset, examples=train), replace(dataset, examples=held)


def tokenise(
    dataset: Dataset, base: Base, max_length: int, tool_format: ToolFormatName | ToolTexts | None = None
) -> list[TokenizedRow]:
    """Tokenise every example; calls of tools are written in `tool_format`, or by the base's chat template.

    Raises `DataError` for a prompt without tokens, a completion that a server would cut or read otherwise, and a row
    over `max_length`.
    """
    tokenizer, encoder, ends, rows = base.tokenizer, TurnEncoder(base.tokenizer), base.ends, []
    for example in dataset.examples:
        where = example.where
        prompt, completion = _encode(encoder, example, tool_format)
        completion.append(tokenizer.eos_token_id)
        if not prompt:
            raise DataError(f"{where}: the prompt is empty; a model needs at least one token before its answer.")
        if end := next((token for token in completion[:-1] if token in ends), None):
            raise DataError(
                f"{where}: the completion holds {tokenizer.decode([end])!r}, the token {end}, at which every answer of "
                "this base ends: what comes after it would never be written. Cut it there, or take it out."
            )
        if len(prompt) + len(completion) > max_length:
            raise DataError(
                f"{where} has {len(prompt) + len(completion)} tokens, over the limit of {max_length}: "
                "shorten the row or raise --max-length."
            )
        rows.append(TokenizedRow((*prompt, *completion), len(prompt), example.line))
    return rows


def _encode(
    encoder: TurnEncoder, example: Example, tool_format: ToolFormatName | ToolTexts | None
) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and completion, as a server encodes and generates them. Raises `DataError`."""
    try:
        if example.chat is not None:
            prompt, completion = render_chat(example.where, encoder, example.chat, tool_format)
        else:
            prompt = _render(encoder, example)
            completion = encoder.render_text(example.completion, ASSISTANT, has_special=False)
        return encoder.encode(prompt), encoder.encode(completion)
    except ControlTextError as error:
        raise DataError(f"{example.where}: {error}.") from error


def _render(encoder: TurnEncoder, example: Example) -> Rendered:
    try:
        return encoder.render(example.turns, example.prompt_format)
    except Exception as error:
        raise DataError(f"{example.where}: the base's chat template refuses these turns: {error}.") from error


def batches(rows: Sequence[TokenizedRow], batch_size: int, seed: int, epoch: int) -> list[list[TokenizedRow]]:
    """Return the batches of one epoch, each of rows of like length.

    A pure function of its arguments, so that a run can be repeated and resumed.
    """
    order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - a repeatable shuffle, not a secret
    shuffled = order.sample(list(rows), len(rows))
    span = _BUCKETED * batch_size
    groups = [sorted(shuffled[i : i + span], key=lambda row: len(row.ids)) for i in range(0, len(rows), span)]
    cut = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    order.shuffle(cut)
    return cut


def _example(path: Path, line: int, row: dict[str, Any], columns: Columns, template: Template) -> Example:
    where = f"{path} line {line}"
    if columns.has_messages(row):
        return _chat_example(path, row, row[columns.messages], line, template)
    prompt = _field(where, row, columns.prompt, "--prompt-column")
    completion = _field(where, row, columns.completion, "--completion-column")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat_example(path, row, [*prompt, *completion], line, template)
    template.check_filled(row)
    for name, value in ((columns.prompt, prompt), (columns.completion, completion)):
        check_text(where, name, value)
    if not completion.strip():
        raise DataError(f"{where}: {columns.completion!r} is empty; remove the row or give it an answer.")
    return Example((("user", prompt),), template.completion(completion), path, line, template.prompt_format())


def _field(where: str, row: dict[str, Any], name: str, flag: str) -> Any:
    if name not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"{where} has no column {name!r} (it has {has}): name the right one with {flag}.")
    return row[name]


def _chat_example(path: Path, row: dict[str, Any], turns: Any, line: int, template: Template) -> Example:
    where = f"{path} line {line}"
    if not template.is_plain:
        raise DataError(f"{where} is a list of turns, which the base's chat template renders: leave out --template.")
    chat = read_chat(where, row, turns)
    if chat.needs_tools:
        return Example(chat.turns[:-1], chat.answer.content, path, line, chat=chat)
    return Example(tuple(turn[:2] for turn in chat.turns[:-1]), chat.answer.content, path, line)
