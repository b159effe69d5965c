"""Unpack an upload to a PEFT folder: a zip of the folder, or a safetensors file with the config in its metadata.

A zip of a folder that AdapterHub saved is accepted too; its weights file gets PEFT's name.
"""

from __future__ import annotations

import errno
import io
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from adapters_store.errors import ArtifactError, ArtifactTooLargeError, ArtifactTypeError
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, part_of
from adapters_store.format.safetensors_header import MAX_HEADER_BYTES, read_header

ZIP_TYPE, SAFETENSORS_TYPE = "application/zip", "application/x-safetensors"
MAX_MEMBERS = 64
MAX_RATIO = 200  # weights hardly compress, a zip bomb does
CHUNK = 2**20
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
UNSOUND_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError)
SAVE_SAFELY = (
    "pickles are never opened; save with save_pretrained(..., safe_serialization=True), "
    "in AdapterHub with save_adapter(..., use_safetensors=True)"
)
METADATA_KEYS = {CONFIG: "adapter_config", MANIFEST: "manifest"}
EPOCH = (1980, 1, 1, 0, 0, 0)


def unpack_upload(body: Path, content_type: str, into: Path, max_bytes: int) -> None:
    """Write the PEFT files of an upload into the empty folder `into`.

    At most `max_bytes` are written. Raises `ArtifactError` naming the member that is refused.
    """
    if content_type == ZIP_TYPE:
        _unpack_zip(body, into, max_bytes)
    elif content_type == SAFETENSORS_TYPE:
        _unpack_safetensors(body, into)
    else:
        raise ArtifactTypeError(f"content type {content_type[:80]!r} is neither {ZIP_TYPE} nor {SAFETENSORS_TYPE}")


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Zip an artifact's files by name, uncompressed; the same files give the same bytes."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return body.getvalue()


def _refuse_pickle(start: bytes, name: str) -> None:
    """Raise `ArtifactTypeError` for a pickle or zip by its first bytes.

    A safetensors file starts with its header's length, which may equal these bytes, but then "{" follows.
    """
    if start.startswith((*PICKLE_STARTS, b"PK")) and start[8:9] != b"{":
        raise ArtifactTypeError(f"{name} is a pickle or a zip by its content, not safetensors; {SAVE_SAFELY}", name)


def _unpack_safetensors(body: Path, into: Path) -> None:
    with body.open("rb") as stream:
        start = stream.read(8 + MAX_HEADER_BYTES)
    _refuse_pickle(start, "the body")
    _header, metadata, _start = read_header(start)
    if METADATA_KEYS[CONFIG] not in metadata:
        raise ArtifactError(
            "the safetensors file carries no adapter_config in its metadata: send a zip of the PEFT folder, or add it",
            METADATA_KEYS[CONFIG],
        )
    for name, key in METADATA_KEYS.items():
        if key in metadata:
            (into / name).write_text(metadata[key], encoding="utf-8")
    with body.open("rb") as source, (into / WEIGHTS).open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)  # not `copyfile`, which retries in another way on errors


class _ShortReads(io.FileIO):
    """A file that reads at most `CHUNK` bytes at once: zipfile reads a directory whole before members are known."""

    def read(self, size: int = -1, /) -> bytes:  # type: ignore[override]
        """Read as a file does. Raises `ArtifactTooLargeError` if more than `CHUNK` bytes are asked for at once."""
        if size > CHUNK:
            raise ArtifactTooLargeError(f"the zip's directory has {size} bytes; at most {CHUNK} are taken")
        return super().read(size) or b""


def _unpack_zip(body: Path, into: Path, max_bytes: int) -> None:
    with body.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(PICKLE_STARTS):
        raise ArtifactTypeError(f"the body is a pickle, not a zip; {SAVE_SAFELY}")
    try:
        with _ShortReads(body) as file, zipfile.ZipFile(file) as archive:
            wanted = _choose(archive.infolist())
            _check_sizes(wanted, max_bytes)
            for name, info in wanted.items():
                _extract(archive, info, into / name)
    except UNSOUND_ZIP as error:
        raise ArtifactError(f"the body is not a sound zip: {str(error)[:200]}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: seek to an impossible offset; others are disk errors
            raise
        raise ArtifactError("the body is not a sound zip: it points out of itself") from None


def _choose(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Select the members that make the artifact, by file name, after checking every member.

    One folder around the files is allowed. Other files (README.md, tokenizers, plots) are ignored, except pickles
    and the like, which could be taken for weights: they are refused.
    """
    if len(infos) > MAX_MEMBERS:
        raise ArtifactTooLargeError(f"the zip has {len(infos)} members; at most {MAX_MEMBERS} are taken")
    wanted: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        path = _check_member(info)
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ArtifactTypeError(f"{path.name[:100]} looks like a pickle; {SAVE_SAFELY}", path.name[:100])
        part = part_of(path.name)
        if part is not None and len(path.parts) <= 2 and not info.is_dir():
            if part in wanted:
                raise ArtifactError(f"the zip holds {part} twice", part)
            wanted[part] = info
    if len({PurePosixPath(info.filename).parent for info in wanted.values()}) > 1:
        raise ArtifactError("the zip holds the parts of an artifact in different folders")
    return wanted


def _check_member(info: zipfile.ZipInfo) -> PurePosixPath:
    name, path = info.orig_filename, PurePosixPath(info.filename)
    if "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts or ":" in name or not path.parts:
        raise ArtifactError(f"the zip member {name[:100]!r} points out of its folder", name[:100])
    mode = info.external_attr >> 16
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or not stat.S_IFMT(mode)):
        raise ArtifactError(f"the zip member {name[:100]!r} is a link or a device", name[:100])
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArtifactError(f"the zip member {name[:100]!r} is neither stored nor deflated", name[:100])
    return path


def _check_sizes(wanted: dict[str, zipfile.ZipInfo], max_bytes: int) -> None:
    total = sum(info.file_size for info in wanted.values())
    if total > max_bytes:
        raise ArtifactTooLargeError(f"the zip holds {total} bytes; at most {max_bytes} are taken")
    for name, info in wanted.items():
        if info.file_size > MAX_RATIO * max(info.compress_size, CHUNK // MAX_RATIO):
            raise ArtifactTooLargeError(f"{name} unpacks to more than {MAX_RATIO} times its size: a zip bomb", name)


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, out: Path) -> None:
    """Copy a member to `out`. zipfile returns no more than the declared size, whatever the compressed stream holds."""
    with archive.open(info) as source, out.open("wb") as target:
        while chunk := source.read(CHUNK):
            if target.tell() == 0:
                _refuse_pickle(chunk, out.name)
            target.write(chunk)
