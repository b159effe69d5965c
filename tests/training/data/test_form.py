"""`--form`: labels are those of the data, a schema is a file, and every completion fits or is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters_store.format.folder import read_folder
from adapters_store.format.manifest import TaskForm
from tests.training.conftest import flags
from training.data.dataset import Columns, TrainingData, read_dataset
from training.data.form import MAX_LABELS, form_of
from training.data.template import Template, parse_template
from training.errors import DataError, OptionError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["é", "x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def read(folder: Path, completions: list[str], template: Template | None = None) -> TrainingData:
    """Rows with these completions, all of them held out, too."""
    rows = [json.dumps({"prompt": "p", "completion": completion}) for completion in completions]
    (folder / "data.jsonl").write_text("\n".join(rows))
    dataset = read_dataset(folder / "data.jsonl", Columns(), template or Template())
    return TrainingData(dataset, dataset, [], [])


def schema_file(folder: Path, content: str) -> str:
    """A file with a schema, as `--form` takes it."""
    (folder / "schema.json").write_text(content)
    return str(folder / "schema.json")


@pytest.mark.parametrize("template", ["", "Q: {prompt}\\nA: {completion}"])
def test_labels_are_those_of_the_data(tmp_path: Path, template: str) -> None:
    """Each different completion is a label once, without the template's lead; no `--form` is no form."""
    data = read(tmp_path, ["warm", "cold", "warm", "so-so, é"], parse_template(template) if template else None)
    assert form_of("labels", data) == TaskForm(labels=("cold", "so-so, é", "warm"))
    assert form_of("", data) is None


def test_a_schema_is_read_from_a_file(tmp_path: Path) -> None:
    """Completions that fit a schema are taken, with one space after a comma or a colon or with none."""
    data = read(tmp_path, ['{"a": 1, "b": "é"}', '{"a":22,"b":"x"}'])
    assert form_of(schema_file(tmp_path, json.dumps(SCHEMA)), data) == TaskForm(schema=SCHEMA)


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ('{"b": "x", "a": 1}', "not from"),
        ('{"a": 1,  "b": "x"}', "not from"),
        ('{"a": 1, "b": "y"}', "not from"),
        ('{"a": 1, "b": "x"} ', "not from"),
        ('{"a": 1', "ends too early"),
        ("x", "not from 'x' on"),
    ],
)
def test_a_completion_that_does_not_fit_is_refused_by_its_line(tmp_path: Path, completion: str, said: str) -> None:
    """An adapter is not trained on what no server would let it write."""
    data = read(tmp_path, ['{"a": 1, "b": "x"}', completion])
    with pytest.raises(DataError, match=f"data.jsonl line 2: .*{said}"):
        form_of(schema_file(tmp_path, json.dumps(SCHEMA)), data)


@pytest.mark.parametrize("num_more", [0, 1])
def test_labels_are_few(tmp_path: Path, num_more: int) -> None:
    """As many labels as the limit are taken; one more is refused by the line that brings it."""
    data = read(tmp_path, [f"label {number}" for number in range(MAX_LABELS + num_more)])
    if not num_more:
        assert form_of("labels", data) is not None
        return
    with pytest.raises(DataError, match=f"line {MAX_LABELS + 1} "):
        form_of("labels", data)
    with pytest.raises(DataError, match="line 2: a label has 1000"):
        form_of("labels", read(tmp_path, ["a", "b" * 1001]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not sound JSON"),
        ("[]", "must be a JSON schema"),
        ('{"properties": {"a": {"uniqueItems": true}}}', "cannot be served: .*uniqueItems"),
        (json.dumps({"enum": ["x" * 70_000]}), "bytes"),
    ],
)
def test_a_schema_that_no_server_takes_is_refused(tmp_path: Path, content: str, said: str) -> None:
    """A file that is no schema, or one that could not be served, ends the run before it begins."""
    with pytest.raises(OptionError, match=said):
        form_of(schema_file(tmp_path, content), read(tmp_path, ["{}", "1"]))
    with pytest.raises(OptionError, match="neither `labels` nor a file"):
        form_of(str(tmp_path / "absent"), read(tmp_path, ["{}", "1"]))


def test_the_artifact_carries_the_form(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """`manyhats train --form labels` writes the labels into the manifest."""
    lora = ("--layers", "all", "--r", 4, "--steps", 1)
    result = command(*flags(tiny_base, data, tmp_path / "out", *lora, "--form", "labels"))
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.form == TaskForm(labels=("cold", "warm"))
