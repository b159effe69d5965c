"""Content-addressed folders: whole or absent, durable on return, verified when read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from adapters_store.errors import AbsentError, ArtifactCorruptError
from adapters_store.format.folder import WEIGHTS
from adapters_store.storage.directory import STAGING, Blobs
from tests.kit.forge import digest_of, toy_folder


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def keep(blobs: Blobs, seed: int = 0) -> str:
    """Put an artifact; its digest."""
    with blobs.staging() as area:
        folder = toy_folder(area / "hat", seed)
        digest = digest_of(folder)
        blobs.put(folder, digest)
    return digest


def flip_a_bit(blobs: Blobs, digest: str, place: int = -1) -> None:
    """Flip a bit of a file, as a failing disk may."""
    path = blobs.path(digest) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_is_put_is_read(blobs: Blobs) -> None:
    """An artifact comes back by its digest; another process sees it too; staging is empty."""
    digest = keep(blobs)
    assert Blobs(blobs.root).read(digest).digest == digest
    assert blobs.digests() == {digest}
    assert list((blobs.root / STAGING).iterdir()) == []


def test_the_same_bytes_twice_are_kept_once(blobs: Blobs) -> None:
    """A second put of the same content is the first."""
    assert keep(blobs) == keep(blobs)
    assert len(blobs.digests()) == 1


def test_staging_is_private_and_gone_afterwards(blobs: Blobs) -> None:
    """Only its owner reads what is uploaded; a failure leaves nothing."""
    with pytest.raises(RuntimeError), blobs.staging() as area:
        assert area.stat().st_mode & 0o077 == 0
        (area / "body").write_bytes(b"x")
        raise RuntimeError
    assert list((blobs.root / STAGING).iterdir()) == []


def test_put_makes_bytes_and_names_durable_before_it_returns(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced before the rename, and every directory up to the root's parent after it."""
    log: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        log.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        log.append("rename")
        return rename(self, target)

    with blobs.staging() as area:
        folder = toy_folder(area / "hat")
        digest = digest_of(folder)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", renamed)
        blobs.put(folder, digest)
        moved = log.index("rename")
        assert {str(folder), *(str(folder / path.name) for path in blobs.path(digest).iterdir())} <= set(log[:moved])
        parents = {str(blobs.path(digest).parent), str(blobs.root), str(blobs.root.parent)}
        assert parents <= set(log[moved:])
        log.clear()
        blobs.put(folder, digest)  # it was moved, but the one who did may have died before it was durable
        assert parents <= set(log)


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_full_disk_keeps_nothing(blobs: Blobs, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """The disk's error comes through, nothing is there, and the next put works."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with blobs.staging() as area:
        folder = toy_folder(area / "hat")
        digest = digest_of(folder)
        monkeypatch.setattr(os if fails == "fsync" else Path, fails, full)
        with pytest.raises(OSError, match="No space"):
            blobs.put(folder, digest)
        monkeypatch.undo()
    assert blobs.digests() == set()
    assert keep(blobs) == digest


def test_two_uploads_of_the_same_bytes_at_once(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload that loses the race finds the winner's artifact in place."""
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        if STAGING not in target.parts:
            shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    digest = keep(blobs)
    monkeypatch.undo()
    assert blobs.read(digest).digest == digest


@pytest.mark.parametrize("place", [-1, 3, 20])
def test_a_flipped_bit_is_corrupt(blobs: Blobs, place: int) -> None:
    """A bit that changed in a value, in the header's length or in the header is never served."""
    digest = keep(blobs)
    flip_a_bit(blobs, digest, place)
    with pytest.raises(ArtifactCorruptError, match=f"stored artifact {digest[:12]} is corrupt") as caught:
        blobs.read(digest)
    assert caught.value.code == "artifact_corrupt"


def test_what_was_read_is_no_map_of_the_file(blobs: Blobs) -> None:
    """A stored file that is written over and cut short in its place changes nothing of what was read, and maps none."""
    digest = keep(blobs)
    read = blobs.read(digest)
    before = {name: tensor.clone() for name, tensor in read.tensors.items()}
    assert str(blobs.root) not in Path("/proc/self/maps").read_text()
    with (blobs.path(digest) / WEIGHTS).open("r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
        file.truncate(8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.tensors.items())
    with pytest.raises(ArtifactCorruptError):
        blobs.read(digest)


def test_a_lost_file_is_corrupt(blobs: Blobs) -> None:
    """A folder without its weights is corrupt, not absent."""
    digest = keep(blobs)
    (blobs.path(digest) / WEIGHTS).unlink()
    with pytest.raises(ArtifactCorruptError, match="no adapter_model"):
        blobs.read(digest)


def test_a_new_upload_heals_a_corrupt_artifact(blobs: Blobs) -> None:
    """The same bytes uploaded again take the place of what the disk spoilt."""
    digest = keep(blobs)
    flip_a_bit(blobs, digest)
    assert keep(blobs) == digest
    assert blobs.read(digest).digest == digest


def test_what_is_deleted_is_absent(blobs: Blobs) -> None:
    """Deleting is whole, and deleting again is no error."""
    digest, other = keep(blobs), keep(blobs, 1)
    blobs.delete(digest)
    blobs.delete(digest)
    assert blobs.digests() == {other}
    with pytest.raises(AbsentError, match=f"no artifact {digest[:12]}"):
        blobs.read(digest)


def test_deleted_while_it_is_read_is_absent(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is overtaken by a delete is told absent, not corrupt."""
    digest, read = keep(blobs), Path.read_bytes

    def overtaken(self: Path) -> bytes:
        blobs.delete(digest)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", overtaken)
    with pytest.raises(AbsentError):
        blobs.read(digest)


def test_sweep_takes_what_nobody_refers_to(blobs: Blobs) -> None:
    """After a crash: staging is emptied, orphans go, what a version refers to stays."""
    kept, orphan = keep(blobs), keep(blobs, 1)
    (blobs.root / STAGING / "left").mkdir(parents=True)
    assert blobs.sweep({kept, "f" * 64}) == 1
    assert blobs.digests() == {kept}
    assert not blobs.path(orphan).exists()
    assert not (blobs.root / STAGING / "left").exists()


def test_sweep_of_nothing(blobs: Blobs) -> None:
    """A first start has nothing to sweep."""
    assert blobs.sweep(set()) == 0
