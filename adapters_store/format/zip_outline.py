"""Send an artifact's files as a zip without having them in memory: all of the zip but the files' own bytes is small."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, cast

EPOCH = (1980, 1, 1, 0, 0, 0)
CHUNK = 2**20  # that is read of a file at once


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact in its store; `read(start, stop)` gives these of its `num_bytes` bytes."""

    name: str
    num_bytes: int
    read: Callable[[int, int], bytes]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges, of at most `CHUNK` bytes, that make the file."""
        return ((start, min(start + CHUNK, self.num_bytes)) for start in range(0, self.num_bytes, CHUNK))


@dataclass(frozen=True)
class ZipOutline:
    """A zip of `num_bytes` bytes in pieces: bytes of its own, and files of a store that come whole in between."""

    pieces: tuple[bytes | StoredFile, ...]
    num_bytes: int


def outline_zip(files: Iterable[StoredFile], see: Callable[[str, bytes], object]) -> ZipOutline:
    """Read files once, a chunk at a time, and return the zip that they make, uncompressed.

    `see` gets each chunk with its file's name. The same files give the same bytes, those of `zipped`.
    """
    recorder = _Recorder()
    with zipfile.ZipFile(cast("IO[bytes]", recorder), "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            info = zipfile.ZipInfo(file.name, EPOCH)
            info.file_size = file.num_bytes  # tells if the zip needs fields of 64 bits
            with archive.open(info, "w") as member:
                recorder.begin(file)
                for start, stop in file.ranges():
                    chunk = file.read(start, stop)
                    see(file.name, chunk)
                    member.write(chunk)
                recorder.end()
    return recorder.outline()


class _Recorder:
    """A file that `zipfile` writes to, of which only what it writes itself is kept."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytes | StoredFile] = {}  # by where they begin; a header is written twice
        self._at, self._is_in_file = 0, False

    def begin(self, file: StoredFile) -> None:
        """Keep the file instead of the bytes that are written until `end`."""
        self._pieces[self._at], self._is_in_file = file, True

    def end(self) -> None:
        """Keep the bytes that are written again."""
        self._is_in_file = False

    def write(self, data: bytes) -> int:
        """Write bytes at the place that was reached."""
        if not self._is_in_file:
            self._pieces[self._at] = bytes(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        """Return the place of the next bytes."""
        return self._at

    def seek(self, to: int) -> int:
        """Go on writing at another place."""
        self._at = to
        return to

    def flush(self) -> None:
        """Do nothing: nothing waits."""

    def outline(self) -> ZipOutline:
        """Return all pieces in their order."""
        pieces = tuple(piece for _, piece in sorted(self._pieces.items(), key=lambda item: item[0]))
        return ZipOutline(pieces, sum(len(p) if isinstance(p, bytes) else p.num_bytes for p in pieces))
