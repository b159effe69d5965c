"""What the routes share: the rooms that they call, given to them by the composition root."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute

from adapters_store.audit import act_as
from adapters_store.blobs import Blobs
from adapters_store.errors import AbsentError
from adapters_store.registry import Registry, Version
from adapters_store.spec import ItemBytes
from adapters_store.tenants import Tenants
from server.api.body import Model, read_json
from server.api.callers import Caller, Callers
from server.api.limits import Meters
from server.api.text import Tokenizer
from server.api.usage import UsageBuffer
from server.engine.client import EngineClient
from server.engine.messages import EngineFailure, Ready
from server.errors import (
    DrainingError,
    ForbiddenError,
    InvalidFieldError,
    NotFoundError,
    UnavailableError,
    VersionGoneError,
)
from server.metrics import Metrics
from server.recent import Recent
from server.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_GONE = 4096  # far more than go between a request's resolution and its start
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
    tenants: Tenants
    callers: Callers
    meters: Meters = field(default_factory=Meters)
    in_use: InUse = field(default_factory=lambda: InUse())
    usage: UsageBuffer = field(default_factory=UsageBuffer)
    recent: Recent = field(default_factory=Recent)
    given_up: set[str] = field(default_factory=set)  # digests of deleted versions that some request may still wear
    gone: dict[str, None] = field(default_factory=dict)  # the last digests whose artifacts were deleted, or will be
    intake: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_INTAKES))
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one artifact at a time is worn by the engine
    proving: asyncio.Lock = field(default_factory=asyncio.Lock)  # one of the store's at a time is put to the proof
    ground: str = ""  # what a proof holds for: see `ground_of`
    unproved: dict[str, EngineFailure | None] = field(default_factory=dict)  # stored digests; why one may not be worn
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

    async def check_kept(self, tenant: str, versions: Iterable[Version]) -> None:
        """Raise `VersionGoneError` for a version that was deleted after it was resolved and before it was held.

        Once this has passed, a held artifact stays. One that is lost in another way is for the engine to report.
        """
        for version in versions:
            if version.digest in self.gone:
                try:
                    await self.resolve(tenant, version.task, version.number)
                except NotFoundError as error:
                    raise VersionGoneError(str(error), error.param) from None

    async def keep_pinned(self) -> None:
        """Tell the engine what pinned tasks route to: after every change of a route, a pin or a version."""
        self.client.keep(await asyncio.to_thread(self.registry.pinned_digests))

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
        self.gone[digest] = None
        if len(self.gone) > MAX_GONE:
            del self.gone[next(iter(self.gone))]
        self.client.forget(digest)
        await asyncio.to_thread(self.blobs.delete, digest)


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


def front_of(request: Request) -> Front:
    """The front that the application was made with."""
    front: Front = request.app.state.front
    return front


async def identify(request: Request) -> None:
    """What every route but health depends on: sets who calls, and for which tenant, before anything else is looked at.

    Raises `ForbiddenError`, `UnauthorizedError`, `NotFoundError` for a tenant that is absent, or `DrainingError` but to
    who only looks.
    """
    front, headers = front_of(request), request.headers
    front.callers.check_origin(headers.get("host"), headers.get("origin"))
    caller = await front.callers.identify(headers.get("authorization", ""), headers.get("x-tenant"))
    act_as(caller.name, request.state.request_id)
    if front.is_draining and request.method != "GET":
        raise DrainingError("the server is stopping: ask again in a moment", retry_after=5)
    request.state.caller, request.state.tenant = caller, caller.tenant


async def admit(request: Request) -> None:
    """What every route of a tenant's own things depends on: as `identify`, and a request of the tenant is counted.

    Raises what `identify` raises, and `TenantLimitError`.
    """
    await identify(request)
    caller = caller_of(request)
    front_of(request).meters.count_request(caller.tenant, caller.limits)


def may(scope: str, looking: bool = False) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """A dependency behind `admit` or `identify`: the key has this scope. With `looking` GET needs none."""

    async def check(request: Request) -> None:
        caller = caller_of(request)
        if scope not in caller.scopes and not (looking and request.method == "GET"):
            has = ", ".join(sorted(caller.scopes))
            raise ForbiddenError(f"this needs a key with the scope {scope}; this key has: {has}")

    return check


async def only_operator(request: Request) -> None:
    """A dependency behind `identify`: the admin key, or no key where none is asked for. Raises `ForbiddenError`."""
    if not caller_of(request).is_operator:
        raise ForbiddenError("this needs the server's admin key")


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


def caller_of(request: Request) -> Caller:
    """Who calls, as `identify` found it."""
    caller: Caller = request.state.caller
    return caller
