"""What the routes share: the rooms that they call, given to them by the composition root."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from adapters_store.base.spec import ItemBytes
from adapters_store.errors import AbsentError
from adapters_store.registry.registry import Registry, Version
from adapters_store.registry.tenants import Tenants
from adapters_store.storage.directory import Blobs
from server.api.body import Model, read_json
from server.core import EngineFailure
from server.engine.client import EngineClient
from server.engine.messages import Ready
from server.errors import NotFoundError, UnavailableError, VersionGoneError
from server.metrics import Metrics
from server.requests.auth import Callers
from server.requests.rate_limits import RateLimiter
from server.requests.tokenizer import Tokenizer
from server.requests.usage import UsageBuffer
from server.requests.version_stats import Recent
from server.settings import Settings
from server.uploads.retention import MAX_RECENTLY_DELETED, InUse

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_INTAKES = 2  # uploads that are unpacked and checked at once: each is in memory whole


@dataclass
class ServerState:
    """The front process: everything that a route may need."""

    settings: Settings
    client: EngineClient
    registry: Registry
    blobs: Blobs
    tokenizer: Tokenizer
    metrics: Metrics
    tenants: Tenants
    callers: Callers
    rate_limiter: RateLimiter = field(default_factory=RateLimiter)
    in_use: InUse = field(default_factory=lambda: InUse())
    usage: UsageBuffer = field(default_factory=UsageBuffer)
    recent: Recent = field(default_factory=Recent)
    marked_for_deletion: set[str] = field(
        default_factory=set
    )  # digests of deleted versions that some request may still wear
    recently_deleted: dict[str, None] = field(
        default_factory=dict
    )  # the last digests whose artifacts were deleted, or will be
    intake: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_INTAKES))
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one artifact at a time is worn by the engine
    validating: asyncio.Lock = field(default_factory=asyncio.Lock)  # one of the store's at a time is put to the proof
    validation_fingerprint: str = ""  # what a proof holds for: see `compute_validation_fingerprint`
    unvalidated: dict[str, EngineFailure | None] = field(
        default_factory=dict
    )  # stored digests; why one may not be worn
    is_draining: bool = False  # about to end: what runs may finish, nothing new begins
    num_imports_pending: int = 0  # folders of --import that failed for a passing reason and are tried again
    last_item_bytes: ItemBytes | None = None
    store_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # an artifact and its version come and go together

    def ready(self) -> Ready:
        """The engine's description. Raises `UnavailableError` while there is none."""
        if self.client.ready is None:
            raise UnavailableError(self.client.last_error or "the engine is starting", retry_after=2)
        return self.client.ready

    def item_bytes(self) -> ItemBytes | None:
        """What a number takes on the device, which stays so while this server runs; None before an engine was there."""
        if self.client.ready is not None:
            self.last_item_bytes = self.client.ready.item_bytes
        return self.last_item_bytes

    async def resolve(self, tenant: str, task: str, version: int | None, user: str | None = None) -> Version:
        """The version that a request for a task gets now. Raises `NotFoundError`."""
        return await self.absent_is_404(self.registry.resolve, tenant, task, version, user)

    async def absent_is_404(self, call: Callable[..., T], *args: object, param: str = "task") -> T:
        """Run a call of the registry in a thread; what is absent is 404, of `param`."""
        try:
            return await asyncio.to_thread(call, *args)
        except AbsentError as error:
            raise NotFoundError(str(error), param) from None

    async def body(self, request: Request, model: type[Model]) -> Model:
        """A request's JSON, within the settings' bounds. Raises what `read_json` raises."""
        return await read_json(request, model, self.settings.max_body_bytes, self.settings.body_timeout_s)

    async def ensure_not_deleted(self, tenant: str, versions: Iterable[Version]) -> None:
        """Raise `VersionGoneError` for a version that was deleted after it was resolved and before it was held.

        Once this has passed, a held artifact stays. One that is lost in another way is for the engine to report.
        """
        for version in versions:
            if version.digest in self.recently_deleted:
                try:
                    await self.resolve(tenant, version.task, version.number)
                except NotFoundError as error:
                    raise VersionGoneError(str(error), error.param) from None

    async def sync_pinned(self) -> None:
        """Tell the engine what pinned tasks route to: after every change of a route, a pin or a version."""
        self.client.keep_resident(await asyncio.to_thread(self.registry.pinned_digests))

    async def mark_for_deletion(self, digests: list[str]) -> None:
        """Versions were deleted, or never made: their artifacts go as soon as nothing needs them."""
        self.marked_for_deletion.update(digests)
        await self.delete_if_unreferenced(digests)

    async def delete_if_unreferenced(self, digests: list[str]) -> None:
        """Delete those of the artifacts that were given up, that no version refers to, and no request wears.

        A failure is logged: at the next start what no version refers to is swept.
        """
        if not any(digest in self.marked_for_deletion and not self.in_use.is_held(digest) for digest in digests):
            return
        try:
            async with self.store_lock:
                referenced = await asyncio.to_thread(self.registry.digests)
                for digest in self.marked_for_deletion.intersection(digests):
                    if not self.in_use.is_held(digest):  # its end would bury it
                        self.marked_for_deletion.discard(digest)
                        await self._delete(digest, digest in referenced)
        except Exception:
            log.exception("an artifact could not be deleted; the next start will", extra={"digests": digests})

    async def _delete(self, digest: str, is_referenced: bool) -> None:
        if is_referenced:
            return
        self.recently_deleted[digest] = None
        if len(self.recently_deleted) > MAX_RECENTLY_DELETED:
            del self.recently_deleted[next(iter(self.recently_deleted))]
        self.client.discard(digest)
        await asyncio.to_thread(self.blobs.delete, digest)
