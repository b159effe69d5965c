"""Store artifacts by digest in a directory: each is a PEFT folder, written completely or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adapters_store.durable import fsync, sync_folder
from adapters_store.errors import AbsentError, ArtifactCorruptError, ArtifactError, StoreDownError, StoreError
from adapters_store.format.folder import (
    CONFIG,
    FILES,
    WEIGHTS,
    Artifact,
    artifact_of,
    digest_of,
    digest_of_hashes,
    find_parts,
    read_files,
)
from adapters_store.format.zip_outline import StoredFile, ZipOutline, outline_zip

STAGING = "staging"
OWNER = "owner"  # a file with the identity of the registry that the store belongs to
CALL_WITHIN_S = 10.0  # of a call that moves few bytes
MIN_BYTES_PER_S = 2**20  # of one that moves more: slower is down


def limit_s(num_bytes: int = 0) -> float:
    """Return the seconds in which a store moves so many bytes, or is down."""
    return CALL_WITHIN_S + num_bytes / MIN_BYTES_PER_S


class Blobs:
    """A directory of artifacts, `<digest[:2]>/<digest>/`, with a private `staging` area beside them.

    Files are read and verified, never mapped: a mapped file that another process truncates would end this one.

    Every write may raise `OSError` (a full disk). `sweep` deletes what that leaves, as all that no version refers to.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Make a private temporary folder on the same file system, which is deleted when the block ends."""
        area = self.root / STAGING
        area.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(dir=area))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, digest: str) -> None:
        """Move a folder of `staging` into place; durable on return.

        An artifact that exists is left unchanged, unless it is corrupt: then the new bytes replace it.
        """
        target = self.path(digest)
        if not self.is_whole(digest):
            self.delete(digest)
            sync_folder(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():  # another upload of the same bytes may have come first
                    raise
        for parent in (target.parent, self.root, self.root.parent):  # also if another upload moved it just now
            fsync(parent)

    def is_whole(self, digest: str) -> bool:
        """Tell if an artifact exists and its bytes match its digest."""
        try:
            self.read(digest)
        except (AbsentError, ArtifactCorruptError):
            return False
        return True

    def path(self, digest: str) -> Path:
        """Return the path of a digest's folder, whether it exists or not."""
        return self.root / digest[:2] / digest

    def read(self, digest: str) -> Artifact:
        """Read an artifact and verify its digest. Raises `AbsentError` or `ArtifactCorruptError`."""
        try:
            return artifact_of(self.files(digest))
        except ArtifactError as error:
            if isinstance(error, ArtifactCorruptError):
                raise
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error

    def files(self, digest: str) -> dict[str, bytes]:
        """Return an artifact's files, bytes by name, verified. Raises `AbsentError` or `ArtifactCorruptError`."""
        try:
            files = self._read(digest)
        except ArtifactError as error:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error
        _check_whole(digest, files, digest_of(files))
        return files

    def outline(self, digest: str) -> ZipOutline:
        """Read an artifact through, verify it, and return the zip of it to send, which reads it again as it is sent.

        Of its bytes one chunk is in memory at a time. Raises `AbsentError` or `ArtifactCorruptError`.
        """
        hashes: defaultdict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
        try:
            files = self._open(digest)
        except ArtifactError as error:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error
        outline = outline_zip(files, lambda name, chunk: hashes[name].update(chunk))
        _check_whole(digest, hashes, digest_of_hashes({name: total.digest() for name, total in hashes.items()}))
        return outline

    def _open(self, digest: str) -> list[StoredFile]:
        """Return the files to read in parts, without verifying them. Raises `AbsentError` or `ArtifactError`."""
        if not self.path(digest).is_dir():
            raise absent(digest)
        parts = find_parts(self.path(digest))
        return [
            StoredFile(name, parts[name].stat().st_size, partial(_read_range, parts[name]))
            for name in FILES
            if name in parts
        ]

    def _read(self, digest: str) -> dict[str, bytes]:
        """Read the files without verifying them. Raises `AbsentError` or `ArtifactError`."""
        try:
            files = read_files(self.path(digest))
        except FileNotFoundError:
            files = {}
        if not files and not self.path(digest).is_dir():  # also if it was deleted during the read
            raise absent(digest)
        return files

    def claim(self, owner: str) -> bool:
        """Claim the store for a registry at start; returns whether it was this registry's already.

        Raises `StoreError` if it is another's: its artifacts would be deleted as unreferenced.
        """
        stored_owner = self._owner()
        if stored_owner is None:
            self._own(owner)
        elif stored_owner != owner:
            raise StoreError("this store of artifacts belongs to another registry: give each registry one of its own")
        return stored_owner is not None

    def check(self) -> None:
        """Raise `OSError` if the store does not answer, or was lost."""
        if self._owner() is None:
            raise StoreDownError("the store of artifacts is not where it was")

    def _owner(self) -> str | None:
        file = self.root / OWNER
        return file.read_text() if file.exists() else None

    def _own(self, owner: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with self.staging() as folder:
            (folder / OWNER).write_text(owner)
            fsync(folder / OWNER)
            (folder / OWNER).rename(self.root / OWNER)
        fsync(self.root)

    def delete(self, digest: str) -> None:
        """Delete an artifact; it is moved away first, so that it is never there in part."""
        with self.staging() as folder:
            if self.path(digest).exists():
                self.path(digest).rename(folder / digest)

    def digests(self) -> set[str]:
        """Return the digests of all artifacts."""
        return {path.name for path in self.root.glob("[0-9a-f][0-9a-f]/*") if path.is_dir()}

    def sweep(self, is_referenced: set[str]) -> int:
        """Empty `staging`, and delete artifacts that are not referenced, at start; returns how many were deleted."""
        shutil.rmtree(self.root / STAGING, ignore_errors=True)
        orphans = self.digests() - is_referenced
        for digest in orphans:
            self.delete(digest)
        return len(orphans)


def absent(digest: str) -> AbsentError:
    """Make the error for an artifact that the store does not have."""
    return AbsentError(f"no artifact {digest[:12]} in the store")


def _check_whole(digest: str, names: Iterable[str], actual: str) -> None:
    """Raise `ArtifactCorruptError` if a file is missing or the files have another digest."""
    missing = {WEIGHTS, CONFIG}.difference(names)
    reason = f"there is no {min(missing)}" if missing else "its digest does not match"
    if missing or actual != digest:
        raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {reason}")


def _read_range(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)
