"""Retention: an artifact goes once no version refers to it and no request uses it, without any other room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.errors import AbsentError
from server.errors import VersionGoneError
from server.uploads import retention
from server.uploads.retention import ArtifactRetention

pytestmark = pytest.mark.anyio


class Rooms:
    """A registry, a store and an engine that note what is asked of them."""

    def __init__(self) -> None:
        self.referenced: set[str] = set()
        self.deleted: list[str] = []
        self.registry = self.blobs = self.database = self.storage = self
        self.retention = ArtifactRetention(self, self, self)  # type: ignore[arg-type]

    async def call(self, function: Any, *arguments: object) -> Any:
        """Call at once, in this thread."""
        return function(*arguments)

    def digests(self) -> set[str]:
        """Digests that some version refers to."""
        return self.referenced

    def resolve(self, _tenant: str, task: str, _number: int, _user: str | None) -> None:
        """Find no version: all of them were deleted."""
        raise AbsentError(f"there is no task {task}")

    def discard(self, _digest: str) -> None:
        """Forget an artifact, as the engine does."""

    def delete(self, digest: str) -> None:
        """Delete an artifact of the store."""
        self.deleted.append(digest)


def version(digest: str) -> Any:
    """A version of the task `a`."""
    return SimpleNamespace(digest=digest, task="a", number=1)


async def test_marked_artifacts_go_with_their_last_use() -> None:
    """A marked artifact goes at once if nothing needs it, else at the end of its last use; a referenced one stays."""
    rooms = Rooms()
    rooms.referenced = {"kept"}
    async with rooms.retention.using("t", [version("used")]):
        async with rooms.retention.using("t", [version("used")]):
            await rooms.retention.mark_for_deletion(["used", "free", "kept"])
            assert rooms.deleted == ["free"] and rooms.retention.is_held("used")
        assert rooms.deleted == ["free"]
    assert rooms.deleted == ["free", "used"] and rooms.retention.is_idle


async def test_a_version_that_went_is_not_used() -> None:
    """A version whose artifact was deleted since it was resolved is `VersionGoneError`, and leaves nothing held."""
    rooms = Rooms()
    await rooms.retention.mark_for_deletion(["a"])
    with pytest.raises(VersionGoneError, match="no task a"):
        async with rooms.retention.using("t", [version("a")]):
            pytest.fail("the block ran")
    assert rooms.retention.is_idle


async def test_deleted_digests_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of too many deleted digests is forgotten: it may be used again without a look-up."""
    monkeypatch.setattr(retention, "MAX_RECENTLY_DELETED", 2)
    rooms = Rooms()
    for digest in "abc":
        await rooms.retention.mark_for_deletion([digest])
    async with rooms.retention.using("t", [version("a")]):
        assert rooms.retention.is_held("a")
    with pytest.raises(VersionGoneError):
        async with rooms.retention.using("t", [version("b")]):
            pytest.fail("the block ran")
