"""List the files of a zip from a stranger, within bounds."""

from __future__ import annotations

import errno
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adapters_store.errors import ArtifactError, ArtifactTooLargeError
from adapters_store.format.selection import ArchiveMember, path_of

MAX_DIRECTORY_BYTES = 2**20  # about ten thousand names
UNSOUND = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError)


class _ShortReads(io.FileIO):
    """A file that reads no more at once than a directory may have: zipfile reads it whole before members are known."""

    def read(self, size: int = -1, /) -> bytes:  # type: ignore[override]
        """Read as a file does. Raises `ArtifactTooLargeError` for more than a directory may have."""
        if size > MAX_DIRECTORY_BYTES:
            raise ArtifactTooLargeError(
                f"the zip's directory has {size} bytes; at most {MAX_DIRECTORY_BYTES} are taken: leave files out"
            )
        return super().read(size) or b""


@contextmanager
def open_zip(body: Path) -> Iterator[list[ArchiveMember]]:
    """List a zip's files, to be opened while the block runs. Raises `ArtifactError` if it is not sound."""
    try:
        with _ShortReads(body) as file, zipfile.ZipFile(file) as archive:
            yield [
                ArchiveMember(path, info.file_size, info.compress_size, _fault(info), partial(archive.open, info))
                for info in archive.infolist()
                if (path := path_of(info.orig_filename)) and not info.is_dir()
            ]
    except UNSOUND as error:
        raise ArtifactError(f"the body is not a sound zip: {str(error)[:200]}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: seek to an impossible offset; others are disk errors
            raise
        raise ArtifactError("the body is not a sound zip: it points out of itself") from None


def _fault(info: zipfile.ZipInfo) -> str | None:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        return "is a link or a device"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    return None
