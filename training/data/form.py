"""The form of a task's answers, as `--form` names it: labels or a JSON schema, which every completion fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from adapters_store.form import (
    MAX_FORM_BYTES,
    FormError,
    byte_tokenizer,
    compile_grammar,
    kind_and_value,
    num_bytes_of,
    write_grammar,
)
from adapters_store.format.manifest import MAX_LABEL_CHARS, TaskForm
from adapters_store.format.strict_json import StrictJSONError, loads
from training.data.dataset import Example, TrainingData
from training.errors import DataError, OptionError

LABELS = "labels"
MAX_LABELS = 64


def form_of(option: str, data: TrainingData) -> TaskForm | None:
    """Return the form that `--form` names: `labels`, those of the data, or a file with a JSON schema; empty: none.

    Raises `OptionError` for a schema that no server takes, and `DataError`, naming the line, for a completion that the
    form does not allow.
    """
    if not option:
        return None
    # An answer of calls has no content that a form could be of.
    examples = tuple(
        one for one in (*data.train.examples, *data.held.examples) if one.chat is None or not one.chat.answer.calls
    )
    if not examples:
        raise OptionError(f"--form {option} is of the answers' content, and every answer calls tools: leave it out.")
    form = TaskForm(labels=_labels(examples)) if option == LABELS else TaskForm(schema=_schema(Path(option)))
    _check_completions(examples, _compiled(option, form, _lead(examples[0])), option)
    return form


def _labels(examples: tuple[Example, ...]) -> tuple[str, ...]:
    labels = dict[str, None]()
    for example in examples:
        labels[label := example.completion.removeprefix(_lead(example))] = None
        if len(label) > MAX_LABEL_CHARS:
            raise DataError(
                f"{example.where}: a label has {MAX_LABEL_CHARS} characters at most, and this {len(label)}."
            )
        if len(labels) > MAX_LABELS:
            raise DataError(
                f"{example.where} has the completion number {len(labels)} that no other row had before it, and labels "
                f"are {MAX_LABELS} at most: give --form a JSON schema, or leave it out."
            )
    return tuple(sorted(labels))


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = loads(path.read_bytes())
    except OSError as error:
        raise OptionError(f"--form {path} is neither `{LABELS}` nor a file to read: {error.strerror}.") from error
    except StrictJSONError as error:
        raise OptionError(f"--form {path} is not sound JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise OptionError(f"--form {path} must be a JSON schema, an object.")
    return schema


def _lead(example: Example) -> str:
    return example.prompt_format.lead if example.prompt_format else ""


def _compiled(option: str, form: TaskForm, lead: str) -> LLMatcher:
    kind, value = kind_and_value(form)
    if (num_bytes := num_bytes_of(value)) > MAX_FORM_BYTES:
        raise OptionError(f"--form {option} has {num_bytes} bytes, and a server takes {MAX_FORM_BYTES}.")
    try:
        return compile_grammar(byte_tokenizer(), write_grammar(kind, value, lead))
    except (FormError, ValueError) as error:
        raise OptionError(f"--form {option} cannot be served: {' '.join(str(error).split())[:400]}") from error


def _check_completions(examples: tuple[Example, ...], matcher: LLMatcher, option: str) -> None:
    """Raise `DataError` for a completion that a server would never let the adapter write."""
    known = set[str]()
    for example in examples:
        if example.completion in known:
            continue
        known.add(example.completion)
        copy, written = matcher.deep_copy(), [*example.completion.encode()]
        num_fit = copy.try_consume_tokens(written)
        if num_fit == len(written) and copy.is_accepting():
            continue
        rest = bytes(written[num_fit:]).decode(errors="replace")[:40]
        said = f"not from {rest!r} on" if rest else "it ends too early"
        raise DataError(
            f"{example.where}: --form {option} does not allow this completion ({said}). JSON must have the "
            "schema's order of members, and no white space but one space after a comma or a colon."
        )
