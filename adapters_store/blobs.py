"""Content-addressed bytes: each artifact is a PEFT folder named by its digest, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.artifact import Artifact, fsync, read_folder, sync_folder
from adapters_store.errors import AbsentError, ArtifactCorruptError, ArtifactError

STAGING = "staging"


class Blobs:
    """A directory of artifacts, `<digest[:2]>/<digest>/`, and beside them a private `staging` area.

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
        if not self._is_whole(digest):
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

    def _is_whole(self, digest: str) -> bool:
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
            artifact = read_folder(self.path(digest))
        except (ArtifactError, FileNotFoundError) as error:
            if not self.path(digest).is_dir():  # also where it was deleted while it was read
                raise AbsentError(f"no artifact {digest[:12]} in the store") from None
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: {error}") from error
        if artifact.digest != digest:
            raise ArtifactCorruptError(f"the stored artifact {digest[:12]} is corrupt: its digest does not match")
        return artifact

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
