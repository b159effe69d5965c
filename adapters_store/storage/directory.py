"""Content-addressed bytes: each artifact is a PEFT folder named by its digest, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.durable import fsync, sync_folder
from adapters_store.errors import AbsentError, ArtifactCorruptError, ArtifactError, StoreError
from adapters_store.format.folder import CONFIG, WEIGHTS, Artifact, artifact_of, digest_of, read_files

STAGING = "staging"
OWNER = "owner"  # a file that names the registry whose artifacts these are


class Blobs:
    """A directory of artifacts, `<digest[:2]>/<digest>/`, and beside them a private `staging` area.

    Files are read whole and verified, never mapped: a file that others cut short would end the process.

    Every write may raise OSError (a full disk). What that leaves, as all that no version refers to, `sweep` takes.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private temporary folder on the same file system; gone afterwards, whatever happens."""
        area = self.root / STAGING
        area.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(dir=area))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, digest: str) -> None:
        """Move a folder of `staging` into place; durable on return.

        A digest that is there already is left as it is, unless it is corrupt: then the new bytes take its place.
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
        for parent in (target.parent, self.root, self.root.parent):  # also for one that was moved but not yet durable
            fsync(parent)

    def is_whole(self, digest: str) -> bool:
        """Whether an artifact is there as it was put there."""
        try:
            self.read(digest)
        except (AbsentError, ArtifactCorruptError):
            return False
        return True

    def path(self, digest: str) -> Path:
        """Where a digest's folder is, or would be."""
        return self.root / digest[:2] / digest

    def read(self, digest: str) -> Artifact:
        """Read an artifact and verify its digest. Raises `AbsentError`, or `ArtifactCorruptError`."""
        try:
            return artifact_of(self.files(digest))
        except ArtifactError as error:
            if isinstance(error, ArtifactCorruptError):
                raise
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error

    def files(self, digest: str) -> dict[str, bytes]:
        """The files of an artifact by name, verified. Raises `AbsentError`, or `ArtifactCorruptError`."""
        try:
            files = self._read(digest)
        except ArtifactError as error:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error
        missing = next((name for name in (WEIGHTS, CONFIG) if name not in files), None)
        if missing is not None:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: there is no {missing}")
        if digest_of(files) != digest:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: its digest does not match")
        return files

    def _read(self, digest: str) -> dict[str, bytes]:
        """The files as they are. Raises `AbsentError`, or `ArtifactError`."""
        try:
            files = read_files(self.path(digest))
        except FileNotFoundError:
            files = {}
        if not files and not self.path(digest).is_dir():  # also where it was deleted while it was read
            raise AbsentError(f"no artifact {digest[:12]} in the store")
        return files

    def claim(self, owner: str) -> bool:
        """At start: whether these are this registry's artifacts already; from now on they are.

        Raises `StoreError` where they are another's: it would take them for its own that nobody refers to.
        """
        stored_owner = self._owner()
        if stored_owner is None:
            self._own(owner)
        elif stored_owner != owner:
            raise StoreError("this store of artifacts belongs to another registry: give each registry one of its own")
        return stored_owner is not None

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
        """Remove an artifact: first out of its place, so that it is never there in part."""
        with self.staging() as folder:
            if self.path(digest).exists():
                self.path(digest).rename(folder / digest)

    def digests(self) -> set[str]:
        """All that is kept."""
        return {path.name for path in self.root.glob("[0-9a-f][0-9a-f]/*") if path.is_dir()}

    def sweep(self, is_referenced: set[str]) -> int:
        """At start: empty `staging` and delete what no version refers to; how many artifacts went."""
        shutil.rmtree(self.root / STAGING, ignore_errors=True)
        orphans = self.digests() - is_referenced
        for digest in orphans:
            self.delete(digest)
        return len(orphans)
