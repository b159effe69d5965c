"""List the files of a gzipped tar from a stranger, within bounds."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

from adapters_store.errors import ArtifactError, ArtifactTooLargeError
from adapters_store.format.selection import ArchiveMember, path_of

MAX_MEMBERS = 1000
MAX_HEADER_BYTES = 64 * 2**10  # of a member: its name and attributes
CHUNK = 2**20
UNSOUND = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError, RuntimeError)


class _Bounded(gzip.GzipFile):
    """A gzipped tar that is unpacked up to `max_bytes`.

    tarfile skips a file's bytes by `seek`; what it reads between two files are headers, which it keeps in memory.
    """

    def __init__(self, body: Path, max_bytes: int) -> None:
        super().__init__(body, "rb")
        self._max_bytes, self.may_read = max_bytes, MAX_HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Read as a file does, at most `may_read` bytes. Raises `ArtifactTooLargeError`, also for all that is left."""
        size = -1 if size is None else size
        self.may_read -= size
        if size < 0 or self.may_read < 0:
            raise ArtifactTooLargeError(f"a header of the tar has more than {MAX_HEADER_BYTES} bytes")
        data = super().read(size)
        self._check(self.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek as a file does. Raises `ArtifactTooLargeError` if it is too far."""
        reached = super().seek(min(offset, self._max_bytes + 1), whence)
        self._check(reached)
        return reached

    def _check(self, reached: int) -> None:
        if reached > self._max_bytes:
            raise ArtifactTooLargeError(
                f"the tar unpacks to more than {self._max_bytes} bytes: leave other files out, or send a zip, of which "
                "they are not unpacked"
            )


@contextmanager
def open_tar(body: Path, max_bytes: int) -> Iterator[list[ArchiveMember]]:
    """List a gzipped tar's files, to be opened while the block runs. Raises `ArtifactError` if it is not sound."""
    try:
        with _Bounded(body, max_bytes) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield list(_members(archive, file))
    except UNSOUND as error:
        raise ArtifactError(f"the body is not a sound tar.gz: {str(error)[:200]}") from None


def _members(archive: tarfile.TarFile, file: _Bounded) -> Iterator[ArchiveMember]:
    for number, info in enumerate(archive, 1):
        if number > MAX_MEMBERS:
            raise ArtifactTooLargeError(f"the tar has more than {MAX_MEMBERS} members: leave files out, or send a zip")
        if info.size < 0:
            raise ArtifactError("the body is not a sound tar.gz: a size is negative")
        file.may_read = MAX_HEADER_BYTES
        path = path_of(info.name)
        if not info.isdir():
            fault = None if info.isreg() and not info.issparse() else "is a link, a device or sparse"
            yield ArchiveMember(path, info.size, info.size, fault, partial(_open, archive, info, file))
    while file.tell() < file.seek(file.tell() + CHUNK):  # to the end: gzip checks its sum there
        pass


def _open(archive: tarfile.TarFile, info: tarfile.TarInfo, file: _Bounded) -> IO[bytes]:
    file.may_read = info.size + MAX_HEADER_BYTES
    return cast(IO[bytes], archive.extractfile(info))  # None is for what is no file
