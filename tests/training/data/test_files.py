"""Rows come from files, and from the folders that `datasets` and the hub have."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.format.folder import read_folder
from tests.training.conftest import flags
from training.data.files import digest_of, read_rows
from training.errors import DataError

LINES = ['{"prompt": "a", "completion": "b"}\n', '{"prompt": "c", "completion": "d"}\n']


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, _, row in read_rows(path)]


def test_a_folder_of_the_hub_is_its_train_split(tmp_path: Path) -> None:
    """Files of the split `train` are read, in order, if names say splits, and else all files."""
    (tmp_path / "data").mkdir()
    for name, line in (("train-1", LINES[1]), ("train-0", LINES[0]), ("test-0", '{"prompt": "e"}\n')):
        (tmp_path / "data" / f"{name}.jsonl").write_text(line)
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert rows_of(tmp_path) == [json.loads(line) for line in LINES]
    digest = digest_of(tmp_path)
    (tmp_path / "data" / "test-0.jsonl").unlink()
    assert digest_of(tmp_path) == digest
    (tmp_path / "data" / "train-0.jsonl").write_text(LINES[1])
    assert digest_of(tmp_path) != digest


def test_a_bad_line_of_a_folder_is_named_with_its_file(
    tiny_base: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """The sentence says which of the files, and where in it."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES[0] * 3)
    (folder / "b.jsonl").write_text(LINES[0] + '{"prompt": "c", "completion": ""}\n')
    result = command(*flags(tiny_base, folder, tmp_path / "out", "--steps", 1))
    assert result.exit_code == 1 and "b.jsonl line 2: 'completion' is empty" in " ".join(result.output.split())


def test_messages_are_learned_by_their_last_turn(tiny_base: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """Chat rows of both forms are rendered by the base's chat template, so the manifest has no format of its own."""
    file = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": who}, {"role": "assistant", "content": f"hi {who}"}] for who in "abcdef"]
    split = [{"prompt": [user], "completion": [assistant]} for user, assistant in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*({"messages": both} for both in turns), *split]))
    result = command("--base", tiny_base, "--data", file, "--eval", file, "--out", tmp_path / "out", "--steps", 2)
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.prompt_format is None
    prompts = {bytes(case.prompt_token_ids) for case in manifest.parity}
    assert b"<user>a\n<assistant>" in prompts and len(prompts) <= 6


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("rows.txt", "must be a folder of a data set"), ("rows.jsonl", "Cannot read"), (".", "has no file that ends")],
)
def test_what_holds_no_rows(name: str, sentence: str, tmp_path: Path) -> None:
    """A file of another kind, one that is not there, and a folder without any are told in a sentence."""
    with pytest.raises(DataError, match=sentence):
        rows_of(tmp_path / name)


BROKEN = {
    "too many digits": ("rows.jsonl", '{"prompt": "a"}\n{"prompt": ' + "1" * 5000 + "}\n", "line 2 is not JSON"),
    "a quote inside a cell": ("rows.csv", 'prompt,completion\na,b\n"c"d,e\n', "line 3 is not CSV"),
    "a cell without an end": ("rows.csv", 'prompt,completion\n\n"a,b\n', "line 3 is not CSV"),
    "two columns of a name": ("rows.csv", "prompt,text,text\na,b,c\n", "two columns 'text'"),
    "splits that are no JSON": ("dataset_dict.json", "{", "dataset_dict.json is not JSON"),
    "no splits": ("dataset_dict.json", "{}", "dataset_dict.json has no list 'splits'"),
    "no files": ("state.json", "[]", "state.json has no list '_data_files'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_named(kind: str, tmp_path: Path) -> None:
    """A file that is not what its name says is told in a sentence with its line, or what it lacks."""
    name, text, sentence = BROKEN[kind]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        rows_of(tmp_path)


def test_arrow_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing pyarrow is a sentence that says how to go on."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        rows_of(tmp_path)


LABELS = {"info": {"features": {"label": {"names": ["cold", "warm"], "_type": "ClassLabel"}}}}


def saved_to_disk(folder: Path) -> Path:
    """Write what `DatasetDict.save_to_disk` writes: a folder a split, with Arrow streams and the list of them."""
    pa = pytest.importorskip("pyarrow")
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata={"huggingface": json.dumps(LABELS)})
    for split, texts in (("train", ["red", "blue", "sun"]), ("test", ["sea"])):
        (folder / split).mkdir(parents=True)
        table = pa.table({"text": texts, "label": [1, 0, 1][: len(texts)]}, schema=schema)
        with pa.ipc.new_stream(folder / split / "data-00000-of-00001.arrow", schema) as writer:
            writer.write_table(table)
        named = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(named))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    """The split train of a DatasetDict, or the folder of one split; numbers of labels are their names."""
    folder = saved_to_disk(tmp_path / "saved")
    train = [{"text": "red", "label": "warm"}, {"text": "blue", "label": "cold"}, {"text": "sun", "label": "warm"}]
    assert rows_of(folder) == train
    assert rows_of(folder / "test") == [{"text": "sea", "label": "warm"}]


def test_parquet(tmp_path: Path) -> None:
    """A Parquet file's rows; one that is broken is told."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "train-0.parquet")
    assert rows_of(tmp_path) == [{"prompt": "a", "completion": "b"}]
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Cannot read"):
        rows_of(tmp_path)


def test_columns_that_nothing_reads_are_told(tiny_base: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """A run names the columns that it does not read; one that a template means to fill in is refused."""
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": who, "completion": f"hi {who}", "input": "x"}) + "\n" for who in "ab")
    )
    words = ["--base", tiny_base, "--data", file, "--eval", file, "--out", tmp_path / "out", "--steps", 1]
    result = command(*words, "--template", "{prompt} {input}:")
    assert result.exit_code == 1 and "--template has {input}, a column" in " ".join(result.output.split())
    result = command(*words)
    assert result.exit_code == 0 and "rows.jsonl: not read: input" in " ".join(result.output.split()), result.output


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Of two values of one key none is dropped."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "prompt": "c"}')
    with pytest.raises(DataError, match="line 1 is not JSON: the key 'prompt' appears twice"):
        rows_of(tmp_path / "rows.jsonl")
