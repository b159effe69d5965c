"""Unpack an upload to a PEFT folder: an archive of the folder, or a safetensors file with the config in its metadata.

An archive is a zip or a gzipped tar, of any folder that holds the adapter's: see `selection`. A folder that AdapterHub
saved is accepted too; its weights file gets PEFT's name.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from adapters_store.errors import ArtifactError, ArtifactTooLargeError, ArtifactTypeError
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS
from adapters_store.format.safetensors_header import MAX_HEADER_BYTES, read_header
from adapters_store.format.selection import SAVE_SAFELY, ArchiveMember, Selection, select_parts
from adapters_store.format.tar_file import open_tar
from adapters_store.format.zip_file import open_zip
from adapters_store.format.zip_outline import EPOCH

ZIP_TYPE, SAFETENSORS_TYPE = "application/zip", "application/x-safetensors"
# What clients and browsers call an upload's bytes, which themselves tell what they are.
CONTENT_TYPES = (
    ZIP_TYPE,
    SAFETENSORS_TYPE,
    "application/x-zip-compressed",
    "application/x-zip",
    "application/gzip",
    "application/x-gzip",
    "application/x-tar+gzip",
    "application/x-gtar-compressed",
    "application/x-compressed-tar",
    "application/octet-stream",
)
MAX_RATIO = 200  # weights hardly compress, a zip bomb does
CHUNK = 2**20
ZIP_STARTS, GZIP_START = (b"PK\3\4", b"PK\5\6"), b"\x1f\x8b"
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
METADATA_KEYS = {CONFIG: "adapter_config", MANIFEST: "manifest"}


def unpack_upload(
    body: Path, into: Path, max_bytes: int, count: Callable[[int], None] = lambda _num_bytes: None
) -> list[str]:
    """Write the PEFT files of an upload into the empty folder `into`. Returns the names of the files that were ignored.

    The bytes themselves tell what they are. At most `max_bytes` are written, and `count` is told how many before
    the first of an archive is; what it raises ends all. Raises `ArtifactError` naming the member
    that is refused.
    """
    with body.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":  # the length of safetensors' header comes first, and may begin as anything
        _unpack_safetensors(body, into)
        return []
    _refuse_pickle(start, "the body", PICKLE_STARTS)
    if start.startswith(ZIP_STARTS):
        with open_zip(body) as members:
            return _write(select_parts(members), into, max_bytes, count)
    if start.startswith(GZIP_START):
        num_bytes = body.stat().st_size
        with open_tar(body, min(2 * max_bytes, MAX_RATIO * max(num_bytes, CHUNK // MAX_RATIO))) as members:
            return _write(select_parts(members), into, max_bytes, count)
    raise ArtifactError("the body is neither a zip nor a tar.gz of a PEFT folder, nor a safetensors file")


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Zip an artifact's files by name, uncompressed; the same files give the same bytes."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return body.getvalue()


def _refuse_pickle(start: bytes, name: str, starts: tuple[bytes, ...] = (*PICKLE_STARTS, b"PK")) -> None:
    """Raise `ArtifactTypeError` for a pickle, torch's zip of one too, by its first bytes.

    A safetensors file starts with its header's length, which may equal these bytes, but then "{" follows.
    """
    if start.startswith(starts) and start[8:9] != b"{":
        raise ArtifactTypeError(f"{name} is a pickle or a zip by its content, not safetensors; {SAVE_SAFELY}", name)


def _unpack_safetensors(body: Path, into: Path) -> None:
    with body.open("rb") as stream:
        _header, metadata, _start = read_header(stream.read(8 + MAX_HEADER_BYTES))
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


def _write(selection: Selection, into: Path, max_bytes: int, count: Callable[[int], None]) -> list[str]:
    """Check and write the members that make the adapter. Returns the names of the others."""
    total = sum(member.num_bytes for member in selection.wanted.values())
    if total > max_bytes:
        raise ArtifactTooLargeError(f"the adapter has {total} bytes; at most {max_bytes} are taken")
    for name, member in selection.wanted.items():
        _check(name, member)
    count(total)
    for name, member in selection.wanted.items():
        _extract(member, into / name)
    return selection.ignored


def _check(name: str, member: ArchiveMember) -> None:
    if member.fault is not None:
        raise ArtifactError(f"{member.path.name} {member.fault}", name)
    if member.num_bytes > MAX_RATIO * max(member.packed_bytes, CHUNK // MAX_RATIO):
        raise ArtifactTooLargeError(f"{name} unpacks to more than {MAX_RATIO} times its size: a zip bomb", name)


def _extract(member: ArchiveMember, out: Path) -> None:
    """Copy a member to `out`. Of it comes no more than the declared size, whatever the compressed stream holds."""
    with member.open() as source, out.open("wb") as target:
        while chunk := source.read(CHUNK):
            if target.tell() == 0:
                _refuse_pickle(chunk, out.name)
            target.write(chunk)
