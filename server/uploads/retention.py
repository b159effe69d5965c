"""Keep artifacts that are in use or pinned, delete those that nothing refers to."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from adapters_store.errors import AbsentError
from adapters_store.registry.registry import Version
from server.engine.client import EngineClient
from server.errors import VersionGoneError
from server.logs import cause_of
from server.metrics import Metrics
from server.stores import Stores
from server.tenant_memory import TenantMemories, TenantMemory

log = logging.getLogger(__name__)
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 60.0  # after a step that failed; it doubles
MAX_RECENTLY_DELETED = 4096  # far more than go between a request's resolution and its start


class ArtifactRetention:
    """Decides when a stored artifact goes: once no version refers to it and no request uses it.

    `store_lock` is held while an artifact and its version come or go together. A step that fails, as while the registry
    does not answer, is made again by `keep_retrying`.
    """

    def __init__(
        self, stores: Stores, client: EngineClient, metrics: Metrics, memories: Sequence[TenantMemory] = ()
    ) -> None:
        self._stores, self._client, self._metrics = stores, client, metrics
        self.memories = TenantMemories([metrics, *memories])
        self._is_retry_due = False
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
                resolve = self._stores.registry.resolve
                try:
                    await self._stores.database.call(resolve, tenant, version.task, version.number, None)
                except AbsentError as error:
                    raise VersionGoneError(str(error), "task") from None

    async def retire(self, digests: list[str], tenant: str, task: str | None = None, number: int | None = None) -> None:
        """Do all that follows the deletion of a tenant, of its task or of a version of that, which had the digests."""
        self.memories.forget(tenant, task, number)
        self._marked.update(digests)
        await self.sync_pinned()
        await self.delete_if_unreferenced(digests)

    async def sync_pinned(self) -> None:
        """Tell the engine which artifacts pinned tasks route to: after every change of a route, a pin or a version."""
        with self._retried("the engine was not told what is pinned"):
            self._client.keep_resident(await self._stores.database.call(self._stores.registry.pinned_digests))

    async def mark_for_deletion(self, digests: list[str]) -> None:
        """Delete the artifacts of versions that were never made, as soon as nothing needs them."""
        self._marked.update(digests)
        await self.delete_if_unreferenced(digests)

    async def delete_if_unreferenced(self, digests: list[str]) -> None:
        """Delete those of the artifacts that are marked, that no version refers to and no request uses."""
        if not any(digest in self._marked and not self.is_held(digest) for digest in digests):
            return
        with self._retried("an artifact was not deleted"):
            async with self.store_lock:
                referenced = await self._stores.database.call(self._stores.registry.digests)
                for digest in self._marked.intersection(digests):
                    if not self.is_held(digest):  # else its last user deletes it
                        await self._delete(digest, digest in referenced)
                        self._marked.discard(digest)

    async def keep_retrying(self) -> None:
        """Make the steps that failed again, after a growing wait, until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            await asyncio.sleep(retry_s)
            if not self._is_retry_due:
                retry_s = FIRST_RETRY_S
                continue
            self._is_retry_due, retry_s = False, min(2 * retry_s, MAX_RETRY_S)
            self._metrics.retries.labels("retention").inc()
            await self.sync_pinned()
            await self.delete_if_unreferenced(list(self._marked))

    @contextmanager
    def _retried(self, what: str) -> Iterator[None]:
        """Log a failure of the block, and have `keep_retrying` make it again: the change that it follows was made."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the change is durable, and its answer is due
            self._is_retry_due = True
            log.warning(f"{what} yet; it is tried again", extra=cause_of(error))

    async def _delete(self, digest: str, is_referenced: bool) -> None:
        if is_referenced:
            return
        self._recently_deleted[digest] = None
        if len(self._recently_deleted) > MAX_RECENTLY_DELETED:
            del self._recently_deleted[next(iter(self._recently_deleted))]
        self._client.discard(digest)
        await self._stores.storage.call(self._stores.blobs.delete, digest)
