"""Keep artifacts that are in use or pinned, delete those that nothing refers to."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from adapters_store.errors import AbsentError
from adapters_store.registry.registry import Registry, Version
from adapters_store.storage.directory import Blobs
from server.engine.client import EngineClient
from server.errors import VersionGoneError

log = logging.getLogger(__name__)
MAX_RECENTLY_DELETED = 4096  # far more than go between a request's resolution and its start


class ArtifactRetention:
    """Decides when a stored artifact goes: once no version refers to it and no request uses it.

    `store_lock` is held while an artifact and its version come or go together.
    """

    def __init__(self, registry: Registry, blobs: Blobs, client: EngineClient) -> None:
        self._registry, self._blobs, self._client = registry, blobs, client
        self.store_lock = asyncio.Lock()
        self._num_users: Counter[str] = Counter()  # running requests by digest
        self._marked: set[str] = set()  # digests of deleted versions that some request may still use
        self._recently_deleted: dict[str, None] = {}  # the last digests that were deleted, in that order

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in use and nothing waits for its deletion."""
        return not self._num_users and not self._marked

    def is_held(self, digest: str) -> bool:
        """Whether some request uses an artifact."""
        return digest in self._num_users

    @contextmanager
    def hold(self, digests: list[str]) -> Iterator[None]:
        """Keep artifacts while the block runs; the caller deletes those that nothing needs any more at its end."""
        self._num_users.update(digests)
        try:
            yield
        finally:
            self._num_users.subtract(digests)
            self._num_users += Counter()  # drops the zeros

    @asynccontextmanager
    async def using(self, tenant: str, versions: list[Version]) -> AsyncIterator[None]:
        """Keep a tenant's versions while the block runs; at its end delete the artifacts that nothing needs any more.

        Raises `VersionGoneError` before the block if a version was deleted since it was resolved.
        """
        digests = [version.digest for version in versions]
        try:
            with self.hold(digests):
                await self._ensure_not_deleted(tenant, versions)
                yield
        finally:
            await self.delete_if_unreferenced(digests)

    async def _ensure_not_deleted(self, tenant: str, versions: list[Version]) -> None:
        """Raise `VersionGoneError` if a version was deleted after it was resolved and before it was held.

        Once this has passed, a held artifact stays. One that is lost in another way is for the engine to report.
        """
        for version in versions:
            if version.digest in self._recently_deleted:
                try:
                    await asyncio.to_thread(self._registry.resolve, tenant, version.task, version.number, None)
                except AbsentError as error:
                    raise VersionGoneError(str(error), "task") from None

    async def sync_pinned(self) -> None:
        """Tell the engine which artifacts pinned tasks route to: after every change of a route, a pin or a version."""
        self._client.keep_resident(await asyncio.to_thread(self._registry.pinned_digests))

    async def mark_for_deletion(self, digests: list[str]) -> None:
        """Delete the artifacts of versions that were deleted, or never made, as soon as nothing needs them."""
        self._marked.update(digests)
        await self.delete_if_unreferenced(digests)

    async def delete_if_unreferenced(self, digests: list[str]) -> None:
        """Delete those of the artifacts that are marked, that no version refers to and no request uses.

        A failure is logged: the next start sweeps what no version refers to.
        """
        if not any(digest in self._marked and not self.is_held(digest) for digest in digests):
            return
        try:
            async with self.store_lock:
                referenced = await asyncio.to_thread(self._registry.digests)
                for digest in self._marked.intersection(digests):
                    if not self.is_held(digest):  # else its last user deletes it
                        self._marked.discard(digest)
                        await self._delete(digest, digest in referenced)
        except Exception:
            log.exception("an artifact could not be deleted; the next start will", extra={"digests": digests})

    async def _delete(self, digest: str, is_referenced: bool) -> None:
        if is_referenced:
            return
        self._recently_deleted[digest] = None
        if len(self._recently_deleted) > MAX_RECENTLY_DELETED:
            del self._recently_deleted[next(iter(self._recently_deleted))]
        self._client.discard(digest)
        await asyncio.to_thread(self._blobs.delete, digest)
