"""Read and write an adapter on disk: a PEFT folder with an optional manifest of our own.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `manifest.json` is ours. The digest, an artifact's
identity, is sha256 over the sorted (name, sha256) of these files: each of them can change an answer. AdapterHub's name
of the weights file is read as PEFT's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from adapters_store.durable import fsync, sync_folder
from adapters_store.errors import ArtifactError, ArtifactTooLargeError, MethodUnsupportedError
from adapters_store.format.manifest import Manifest
from adapters_store.format.safetensors_file import read_tensors
from adapters_store.format.strict_json import StrictJSONError, loads

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
FILES = (CONFIG, WEIGHTS, MANIFEST)
ALIASES = {"adapter.safetensors": WEIGHTS}  # AdapterHub's name -> ours
# Files of AdapterHub that change the output and are not served -> what to do.
REFUSED = {
    "model_head.safetensors": "a prediction head of the adapter's own: save with save_adapter(..., with_head=False), "
    "or leave the file out if the base's head was frozen",
    "model_adapter_fusion.safetensors": "an AdapterFusion: only single adapters are served",
    "adapter_interface.json": "an AdapterHub interface for a model that the library does not know by itself",
}
PICKLES = {
    "adapter_model.bin": " (save it with safe_serialization=True)",
    "pytorch_adapter.bin": " (save it with use_safetensors=True)",
}
FORMAT_VERSION = 1
MAX_JSON_BYTES = {CONFIG: 256 * 2**10, MANIFEST: 2**20}
MAX_FORMAT_CHARS = 4096


@dataclass(frozen=True)
class Artifact:
    """An artifact in memory whose form is checked (JSON, layout, finite values), but not yet its method.

    `tensors` keep the dtype of the file; `num_bytes` is the size of all files. `idle_keys` are keys of the config that
    compiling it passed over: no method of ours has them, and they cannot change an answer.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    manifest: Manifest | None
    digest: str
    num_bytes: int
    idle_keys: set[str] = field(default_factory=set, compare=False)


def part_of(name: str) -> str | None:
    """Return the name in `FILES` that a file name stands for, or None.

    Raises `MethodUnsupportedError` for a file that changes the answer and is not served.
    """
    if name in REFUSED:
        raise MethodUnsupportedError(f"{name} is not served: {REFUSED[name]}", name)
    return name if name in FILES else ALIASES.get(name)


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the artifact's files in a folder, by their name in `FILES`. Raises `ArtifactError`."""
    parts: dict[str, Path] = {}
    for path in (folder / name for name in (*FILES, *ALIASES, *REFUSED)):
        part = part_of(path.name) if path.is_file() else None
        if part in parts:
            raise ArtifactError(f"{path.name} and {part} are both there: which one counts?", path.name)
        if part is not None:
            parts[part] = path
    return parts


def read_folder(folder: Path) -> Artifact:
    """Read an artifact from a PEFT folder. Raises `ArtifactError` naming what is wrong."""
    files = read_files(folder)
    if WEIGHTS not in files:
        hint = next((hint for pickle, hint in PICKLES.items() if (folder / pickle).exists()), "")
        raise ArtifactError(f"there is no {WEIGHTS}{hint}", WEIGHTS)
    return artifact_of(files)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the artifact's files in a folder, by their name in `FILES`. Raises `ArtifactError`."""
    return {name: _read_file(path) for name, path in find_parts(folder).items()}


def artifact_of(files: dict[str, bytes]) -> Artifact:
    """Parse an artifact from its files, bytes by name in `FILES`. Raises `ArtifactError` naming what is wrong."""
    for name in (WEIGHTS, CONFIG):
        if name not in files:
            raise ArtifactError(f"there is no {name}", name)
    config = _read_json(CONFIG, files[CONFIG])
    manifest = read_manifest(files[MANIFEST]) if MANIFEST in files else None
    num_bytes = sum(map(len, files.values()))
    return Artifact(config, read_tensors(files[WEIGHTS]), manifest, digest_of(files), num_bytes)


def _read_file(path: Path) -> bytes:
    size, largest = path.stat().st_size, MAX_JSON_BYTES.get(path.name)
    if largest is not None and size > largest:
        raise ArtifactTooLargeError(f"{path.name} has {size} bytes; at most {largest} are taken", path.name)
    return path.read_bytes()


def digest_of(files: dict[str, bytes]) -> str:
    """Compute an artifact's identity: sha256 over the sorted, length-framed (name, sha256) of its files, in hex."""
    return digest_of_hashes({name: hashlib.sha256(data).digest() for name, data in files.items()})


def digest_of_hashes(hashes: Mapping[str, bytes]) -> str:
    """Compute an artifact's identity from the sha256 of each of its files."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(len(name).to_bytes(8, "big") + name.encode() + hashes[name])
    return total.hexdigest()


def read_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest. Raises `ArtifactError`."""
    try:
        manifest = msgspec.convert(_read_json(MANIFEST, data), Manifest)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{MANIFEST}: {error}", MANIFEST) from None
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(f"{MANIFEST} has format_version {manifest.format_version}, not {FORMAT_VERSION}", MANIFEST)
    for name in ("prompt_format", "tools", "reasoning"):
        if len(msgspec.json.encode(getattr(manifest, name))) > MAX_FORMAT_CHARS:
            raise ArtifactError(f"{MANIFEST}: {name} is longer than {MAX_FORMAT_CHARS} characters", MANIFEST)
    if (reasoning := manifest.reasoning) and not (reasoning.before.strip() and reasoning.after.strip()):
        raise ArtifactError(f"{MANIFEST}: reasoning needs a text before it and one after it", MANIFEST)
    return manifest


def _read_json(name: str, data: bytes) -> dict[str, Any]:
    try:
        thing = loads(data)
    except StrictJSONError as error:
        raise ArtifactError(f"{name} is not sound JSON: {error}", name) from None
    if not isinstance(thing, dict):
        raise ArtifactError(f"{name} is not a JSON object", name)
    return thing


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: bytes,
    manifest: Manifest | None = None,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a PEFT folder atomically: a temporary sibling, then a rename.

    An old folder of that name is moved aside first and removed last: if killed in between, one of the two is complete.
    `others` are files by name that are written too, but do not count for the identity: a log, a model card.
    Raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (temporary / WEIGHTS).write_bytes(weights)
        if manifest is not None:
            (temporary / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        for name, data in (others or {}).items():
            (temporary / name).write_bytes(data)
        sync_folder(temporary)
        temporary.chmod(0o755)
        old = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
