"""Files of rows: JSONL, CSV, and the folders of Hugging Face's `datasets`.

A folder is what `save_to_disk` wrote (of a `DatasetDict` the split `train`), or what the hub holds: files of rows, of
which those of the split `train` are taken where names say splits. Arrow and Parquet files need the package pyarrow.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from adapters_store.format.strict_json import unique
from training.errors import DataError

Numbered = Iterator[tuple[int, dict[str, Any]]]
SPLIT = "train"


def read_rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Iterate over rows with their file and line (in Arrow and Parquet: number). Raises `DataError`."""
    for file in files_of(path):
        for line, row in READERS[file.suffix.lower()](file):
            yield file, line, row


def digest_of(path: Path) -> str:
    """Return the sha256 over the bytes of the files, as hex digits. Raises `DataError`."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(_bytes(file))
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """List the file itself, or the files that hold a folder's rows. Raises `DataError`."""
    if path.is_dir():
        return _files_in(path)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} must be a folder of a data set, or a file that ends with {', '.join(READERS)}.")
    return [path]


def _files_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _list_in(folder / "dataset_dict.json", "splits")
        if SPLIT not in splits:
            raise DataError(f"{folder} has no split {SPLIT!r}: name the folder of one of {', '.join(splits)}.")
        return _files_in(folder / SPLIT)
    if (folder / "state.json").is_file():  # save_to_disk, whose other files are not rows
        named = _list_in(folder / "state.json", "_data_files")
        return [folder / Path(str(entry.get("filename"))).name for entry in named if isinstance(entry, dict)]
    readable = sorted(file for file in folder.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    files = [file for file in readable if file.name not in NO_ROWS]
    of_split = [file for file in files if file.name.startswith(SPLIT) or file.parent.name == SPLIT]
    if not files:
        raise DataError(f"{folder} has no file that ends with {', '.join(READERS)}.")
    return of_split or files


NO_ROWS = {"dataset_info.json", "dataset_infos.json"}


def _list_in(path: Path, key: str) -> list[Any]:
    """Return a list out of one of the JSON files that `save_to_disk` writes. Raises `DataError`."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path} has no list {key!r}: it is not what save_to_disk wrote.")
    return entries


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _text(path: Path) -> str:
    raw = _bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8: {error.reason}.") from error


def _jsonl_rows(path: Path) -> Numbered:
    for line, content in enumerate(_text(path).split("\n"), start=1):  # not splitlines(): JSON may hold U+2028
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:  # a ValueError, too, for a number of too many digits
            raise DataError(f"{path} line {line} is not JSON: {error}. Each line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {line} is not a JSON object but {content.strip()[:40]}.")
        yield line, row


def _csv_rows(path: Path) -> Numbered:
    records = _csv_records(path)
    _, header = next(records, (1, []))
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{path} has two columns {twice[0]!r}: which one counts?")
    for line, cells in records:
        if cells and len(cells) != len(header):
            raise DataError(f"{path} line {line} has {len(cells)} cells, the header has {len(header)}.")
        if cells:
            yield line, dict(zip(header, cells, strict=True))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Iterate over records' cells with the line a record begins at: lines may be blank, a quoted cell may span some."""
    reader, line = csv.reader(io.StringIO(_text(path), newline=""), strict=True), 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {line} is not CSV: {error}.") from error


def _arrow_rows(path: Path) -> Numbered:
    """Iterate over the rows of an Arrow stream or a Parquet file; labels as numbers become their features' names."""
    try:
        pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path} needs the package pyarrow: pip install pyarrow, or write the data set as JSONL with to_json()."
        ) from None
    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"Cannot read {path}: {str(error).splitlines()[0]}.") from error
    names = _label_names(table.schema.metadata or {})
    for number, row in enumerate(table.to_pylist(), start=1):
        yield (
            number,
            {key: names[key][value] if _is_label(value, names.get(key)) else value for key, value in row.items()},
        )


def _label_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Map each column that is a `ClassLabel` to its labels' names."""
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _is_label(value: Any, names: list[str] | None) -> bool:
    return names is not None and isinstance(value, int) and 0 <= value < len(names)


READERS: Mapping[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _jsonl_rows,
    ".csv": _csv_rows,
    ".arrow": _arrow_rows,
    ".parquet": _arrow_rows,
}
