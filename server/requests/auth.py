"""Identify callers: the admin, a tenant's key, or, if the server asks for no keys, anyone on this machine."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from adapters_store.errors import AbsentError, RegistryDownError
from adapters_store.registry import DEFAULT_TENANT, SCOPES
from adapters_store.registry.tenants import KeyRecord, TenantLimits, split_key
from server.errors import ForbiddenError, NotFoundError, UnauthorizedError
from server.settings import is_loopback
from server.stores import Stores

REMEMBERED_S = 0.5  # what another process changes in the registry is known so soon
OUTAGE_S = 3600.0  # what was found so lately stands while the registry does not answer
PATIENCE_S = 0.25  # if the registry is slower, what was found before stands for this request
MAX_REMEMBERED = 4096
MAX_NAME = 63
GENERATE, DEPLOY, ADMIN = SCOPES
NO_KEY = "send the key of this server as `Authorization: Bearer KEY`"
V = TypeVar("V")


@dataclass(frozen=True)
class Caller:
    """A caller: its name, its tenant, and its scopes there. An operator has them for every tenant."""

    name: str
    tenant: str
    limits: TenantLimits
    scopes: frozenset[str] = frozenset(SCOPES)
    is_operator: bool = False


class Remembered(Generic[V]):
    """Caches the results of a slow look-up for `REMEMBERED_S`, also those that found nothing.

    While the registry does not answer, or not soon, the last result stands, for up to `OUTAGE_S`.
    """

    def __init__(self, look_up: Callable[[str], Awaitable[V]], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._look_up = look_up
        self._found: OrderedDict[str, tuple[float, V]] = OrderedDict()  # with the time of the look-up
        self._running: dict[str, asyncio.Task[V]] = {}
        self._num_changes = 0

    async def get(self, name: str) -> V:
        """The result for a name, as of the last change. Raises `RegistryDownError`."""
        while True:
            num_changes = self._num_changes
            result = await self._get(name)
            if num_changes == self._num_changes:  # else what was looked up may have been deleted meanwhile
                return result

    async def _get(self, name: str) -> V:
        """The result for a name. Requests for the same name share one look-up."""
        found, now = self._found.get(name), self.clock()
        if found is not None and now < found[0] + REMEMBERED_S:
            return found[1]
        if (look_up := self._running.get(name)) is None:
            look_up = self._running[name] = asyncio.create_task(self._refresh(name))
            look_up.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever waits raises it
        if found is None or now >= found[0] + OUTAGE_S:
            return await asyncio.shield(look_up)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.shield(look_up)
        except (TimeoutError, RegistryDownError):
            return found[1]

    def drop(self, is_changed: Callable[[str, V], bool]) -> None:
        """Look results up again after a change made by this process."""
        for name in [name for name, (_, result) in self._found.items() if is_changed(name, result)]:
            del self._found[name]
        self._running.clear()
        self._num_changes += 1

    async def _refresh(self, name: str) -> V:
        this, began = asyncio.current_task(), self.clock()
        try:
            result = await self._look_up(name)
            if self._running.get(name) is this:  # else there was a change meanwhile
                self._found[name] = began, result
                self._found.move_to_end(name)
                if len(self._found) > MAX_REMEMBERED:
                    self._found.popitem(last=False)
            return result
        finally:
            if self._running.get(name) is this:
                del self._running[name]


class Callers:
    """Identifies callers by their headers. Without an admin key everyone on this machine is the operator."""

    def __init__(self, stores: Stores, admin_key: str | None, host: str, origins: Collection[str] = ()) -> None:
        self._stores, self._admin_key, self._host, self._origins = stores, admin_key, host, origins
        self._keys = Remembered(self._key_of)
        self._limits = Remembered(self._limits_of)

    @property
    def asks_for_keys(self) -> bool:
        """Whether there is an admin key."""
        return self._admin_key is not None

    def clear_cache(self, tenant: str) -> None:
        """Look the keys and limits of a tenant up again, after a change of them or of the tenant."""
        self._keys.drop(lambda _id, record: record is None or record.tenant == tenant)
        self._limits.drop(lambda name, _limits: name == tenant)

    async def identify(self, authorization: str, tenant: str | None) -> Caller:
        """The caller that sends these headers (`tenant`: X-Tenant). Raises `UnauthorizedError`, `NotFoundError`.

        A tenant that is another's is as absent to a key as one that is none.
        """
        if self._admin_key is None:
            return await self._operator("local", DEFAULT_TENANT if tenant is None else tenant)
        scheme, _, given = authorization.partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer":
            raise UnauthorizedError(NO_KEY)
        if hmac.compare_digest(given.encode("latin-1"), self._admin_key.encode()):
            return await self._operator("admin", DEFAULT_TENANT if tenant is None else tenant)
        parts = split_key(given)
        known = None if parts is None else await self._keys.get(parts[0])
        if parts is None or known is None or not known.fits(parts[1]):
            raise UnauthorizedError(NO_KEY)
        if tenant is not None and tenant != known.tenant:
            raise no_tenant(tenant)
        return Caller(parts[0], known.tenant, known.limits, known.scopes)

    def check_origin(self, host: str | None, origin: str | None) -> None:
        """Raise `ForbiddenError` for a request through a web page, if the server asks for no keys.

        A page whose host name leads here, or that posts here from another origin, must not act as this machine's user,
        unless its origin is an allowed one.
        """
        if self._admin_key is not None:
            return
        origin = None if origin in self._origins else origin
        for header, name in (("Host", host), ("Origin", None if origin is None else urlsplit(origin).netloc)):
            if name is not None and not self._is_here(name):
                raise ForbiddenError(
                    f"the header {header} names {name[:80] or 'nothing'}, which is not this machine: "
                    "a server without an admin key answers on loopback names alone",
                    header,
                )

    def _is_here(self, netloc: str) -> bool:
        try:
            name = urlsplit(f"//{netloc}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name == self._host

    async def _operator(self, name: str, tenant: str) -> Caller:
        is_one = self.asks_for_keys or tenant == DEFAULT_TENANT
        limits = await self._limits.get(tenant) if is_one and 0 < len(tenant) <= MAX_NAME else None
        if limits is None:
            raise no_tenant(tenant)
        return Caller(name, tenant, limits, is_operator=True)

    async def _key_of(self, key_id: str) -> KeyRecord | None:
        return await self._stores.database.call(self._stores.tenants.known, key_id)

    async def _limits_of(self, tenant: str) -> TenantLimits | None:
        try:
            return (await self._stores.database.call(self._stores.tenants.get, tenant)).limits
        except AbsentError:
            return None


def no_tenant(name: str) -> NotFoundError:
    """The error for a tenant that is absent, or another's."""
    return NotFoundError(f"there is no tenant {name[:MAX_NAME]}", "X-Tenant")
