"""Identify a base: digests over its architecture, tokenizer and weights. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters_store.format.safetensors_header import trusted_entries

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
# Keys of config.json that do not change the computation: names, training, precision.
IGNORED_KEYS = {
    "_model_name_or_path",
    "_name_or_path",
    "dtype",
    "initializer_range",
    "model_name",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
IGNORED_SUFFIXES = ("dropout", "_pdrop")


class BaseUnavailableError(Exception):
    """A base cannot be found, downloaded or read; the message says why and what to do."""


@dataclass(frozen=True)
class BaseIdentity:
    """The digests of a base: `identity` must match an adapter's, `weights` may differ between copies and precisions.

    `identity` is sha256 over architecture, tensor shapes and tokenizer; `weights` over the bytes of the weight files,
    which are read on first access.
    """

    folder: Path
    identity: str

    @cached_property
    def weights(self) -> str:
        """Compute sha256 over the names and bytes of the weight files; reads them all, once."""
        return _digest([[file.name, sha256_of(file)] for file in _weight_files(self.folder)])


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_identity(folder: Path) -> BaseIdentity:
    """Identify the base in a folder, in milliseconds: of the weight files only the headers are read.

    Raises `BaseUnavailableError` for a folder without safetensors: no other weights are ever opened.
    """
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: entry["shape"] for file in _weight_files(folder) for name, entry in trusted_entries(file).items()}
    if not shapes:
        raise BaseUnavailableError(f"{folder} has no *.safetensors: save the base with save_pretrained")
    tokenizer = {name: sha256_of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return BaseIdentity(folder, _digest([_computing(config), shapes, tokenizer]))


def stamp_of(folder: Path) -> list[tuple[str, int, int]]:
    """Return (name, bytes, time of last change in ns) of a base's files: differs if the base may have been replaced."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _computing(config: Any) -> Any:
    """Keep what changes the computation in a config, floats to 6 digits, so that copies in other formats agree."""
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS and value is not None}
        return {key: _computing(value) for key, value in kept.items() if not key.endswith(IGNORED_SUFFIXES)}
    if isinstance(config, list):
        return [_computing(value) for value in config]
    return f"{config:.6g}" if isinstance(config, float) else config


def _digest(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()
