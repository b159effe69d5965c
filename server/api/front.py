"""What the routes share: the rooms that they call, given to them by the composition root."""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from fastapi.routing import APIRoute

from adapters_store.blobs import Blobs
from adapters_store.errors import AbsentError
from adapters_store.registry import DEFAULT_TENANT, Registry, Version
from adapters_store.spec import ItemBytes
from server.api.text import Tokenizer
from server.engine.client import EngineClient
from server.engine.messages import Ready
from server.errors import DrainingError, InvalidFieldError, NotFoundError, UnauthorizedError, UnavailableError
from server.metrics import Metrics
from server.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")
USAGE_EVERY_S = 1.0
MAX_INTAKES = 2  # uploads that are unpacked and checked at once: each is in memory whole


@dataclass
class Front:
    """The front process: everything that a route may need."""

    settings: Settings
    client: EngineClient
    registry: Registry
    blobs: Blobs
    tokenizer: Tokenizer
    metrics: Metrics
    in_use: InUse = field(default_factory=lambda: InUse())
    usage: UsageBuffer = field(default_factory=lambda: UsageBuffer())
    given_up: set[str] = field(default_factory=set)  # digests of deleted versions that some request may still wear
    leaving: set[str] = field(default_factory=set)  # digests whose artifacts are being deleted
    intake: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_INTAKES))
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one upload at a time is worn by the engine
    is_draining: bool = False  # about to end: what runs may finish, nothing new begins
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

    async def resolve(self, tenant: str, task: str, version: int | None) -> Version:
        """The version that a task gets now. Raises `NotFoundError`."""
        try:
            return await asyncio.to_thread(self.registry.resolve, tenant, task, version)
        except AbsentError as error:
            raise NotFoundError(str(error), "task") from None

    async def absent_is_404(self, call: Callable[..., T], *args: object) -> T:
        """Run a call of the registry in a thread; what is absent is 404."""
        try:
            return await asyncio.to_thread(call, *args)
        except AbsentError as error:
            raise NotFoundError(str(error), "task") from None

    async def check_kept(self, tenant: str, versions: Iterable[Version]) -> None:
        """Raise `NotFoundError` for a version that was deleted after it was resolved and before it was held.

        Once this has passed, a held artifact stays. One that is lost in another way is for the engine to report.
        """
        for version in versions:
            if version.digest in self.leaving or not self.blobs.path(version.digest).is_dir():
                await self.resolve(tenant, version.task, version.number)

    async def give_up(self, digests: list[str]) -> None:
        """Versions were deleted, or never made: their artifacts go as soon as nothing needs them."""
        self.given_up.update(digests)
        await self.bury(digests)

    async def bury(self, digests: list[str]) -> None:
        """Delete those of the artifacts that were given up, that no version refers to, and no request wears.

        A failure is logged: at the next start what no version refers to is swept.
        """
        if not any(digest in self.given_up and not self.in_use.is_held(digest) for digest in digests):
            return
        try:
            async with self.store_lock:
                referenced = await asyncio.to_thread(self.registry.digests)
                for digest in self.given_up.intersection(digests):
                    if not self.in_use.is_held(digest):  # its end would bury it
                        self.given_up.discard(digest)
                        await self._delete(digest, digest in referenced)
        except Exception:
            log.exception("an artifact could not be deleted; the next start will", extra={"digests": digests})

    async def _delete(self, digest: str, is_referenced: bool) -> None:
        if is_referenced:
            return
        self.leaving.add(digest)
        try:
            self.client.forget(digest)
            await asyncio.to_thread(self.blobs.delete, digest)
        finally:
            self.leaving.discard(digest)


class InUse:
    """How many running requests wear each digest. An artifact goes only when the last one has ended."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def hold(self, digests: list[str]) -> Iterator[None]:
        """Keep digests while the block runs."""
        self._counts.update(digests)
        try:
            yield
        finally:
            self._counts.subtract(digests)
            self._counts += Counter()  # drops the zeros

    def is_held(self, digest: str) -> bool:
        """Whether some request wears it."""
        return digest in self._counts


class UsageBuffer:
    """Usage on its way to the registry: counted at once, written once a second in a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, int], list[int]] = {}

    def add(self, tenant: str, task: str, version: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a request."""
        with self._lock:
            counts = self._counts.setdefault((tenant, task, version), [0, 0, 0])
            for index, number in enumerate((1, prompt_tokens, completion_tokens)):
                counts[index] += number

    def flush(self, registry: Registry) -> None:
        """Write what was counted; kept for the next time if the registry fails."""
        with self._lock:
            taken, self._counts = self._counts, {}
        for (tenant, task, version), (requests, prompt, completion) in taken.items():
            try:
                registry.add_usage(
                    tenant, task, version, requests=requests, prompt_tokens=prompt, completion_tokens=completion
                )
            except Exception:
                log.exception("usage could not be written; it is kept")
                with self._lock:
                    counts = self._counts.setdefault((tenant, task, version), [0, 0, 0])
                    for index, number in enumerate((requests, prompt, completion)):
                        counts[index] += number

    async def keep_flushing(self, registry: Registry) -> None:
        """Flush once a second until cancelled."""
        while True:
            await asyncio.sleep(USAGE_EVERY_S)
            await asyncio.to_thread(self.flush, registry)


def front_of(request: Request) -> Front:
    """The front that the application was made with."""
    front: Front = request.app.state.front
    return front


async def admit(request: Request) -> None:
    """What every route but health depends on: sets the tenant of the key before anything else is looked at.

    Raises `UnauthorizedError`, `NotFoundError` for a tenant that is absent, or `DrainingError` but to who only looks.
    """
    key = front_of(request).settings.admin_key
    if key is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        wanted = key.get_secret_value().encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), wanted):
            raise UnauthorizedError("send the key of this server as `Authorization: Bearer KEY`")
    tenant = request.headers.get("x-tenant", DEFAULT_TENANT)
    if tenant != DEFAULT_TENANT:
        raise NotFoundError(f"there is no tenant {tenant[:63]}", "X-Tenant")
    if front_of(request).is_draining and request.method != "GET":
        raise DrainingError("the server is stopping: ask again in a moment", retry_after=5)
    request.state.tenant = tenant


async def refuse_unknown_query(request: Request) -> None:
    """A parameter that a route does not know, or that is there twice, would be ignored in silence.

    Raises `InvalidFieldError`.
    """
    route: APIRoute = request.scope["route"]
    known = {parameter.alias for parameter in route.dependant.query_params}
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            said = ", ".join(sorted(known)) or "none"
            raise InvalidFieldError(f"unknown query parameter {name[:200]}; this route has: {said}", name[:200])
        if count > 1:
            raise InvalidFieldError(f"the query parameter {name} is there {count} times", name)


def tenant_of(request: Request) -> str:
    """Who asks, as `admit` found it."""
    tenant: str = request.state.tenant
    return tenant
