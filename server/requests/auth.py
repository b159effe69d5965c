"""Identify callers: the admin, a tenant's key, or, if the server asks for no keys, anyone on this machine."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from adapters_store.errors import AbsentError
from adapters_store.registry.tenants import DEFAULT_TENANT, SCOPES, TenantLimits, Tenants, split_key
from server.errors import ForbiddenError, NotFoundError, UnauthorizedError
from server.settings import is_loopback

REMEMBERED_S = 0.5  # what another process changes in the registry is known so soon
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


@dataclass
class Remembered(Generic[V]):
    """Caches the results of a slow look-up for `REMEMBERED_S`, also those that found nothing."""

    look_up: Callable[[str], V]
    clock: Callable[[], float] = time.monotonic
    _found: dict[str, tuple[float, V]] = field(default_factory=dict)

    async def get(self, name: str) -> V:
        """The result for a name; looked up in a thread if the cached one is not fresh."""
        found = self._found.get(name)
        if found is None or self.clock() >= found[0]:
            found = self.clock() + REMEMBERED_S, await asyncio.to_thread(self.look_up, name)
            if len(self._found) >= MAX_REMEMBERED:
                self._found.clear()
            self._found[name] = found
        return found[1]

    def clear_cache(self) -> None:
        """Look everything up again, after a change made by this process."""
        self._found.clear()


class Callers:
    """Identifies callers by their headers. Without an admin key everyone on this machine is the operator."""

    def __init__(self, tenants: Tenants, admin_key: str | None, host: str, origins: Collection[str] = ()) -> None:
        self._tenants, self._admin_key, self._host, self._origins = tenants, admin_key, host, origins
        self._keys = Remembered(tenants.known)
        self._limits = Remembered(self._limits_of)

    @property
    def asks_for_keys(self) -> bool:
        """Whether there is an admin key."""
        return self._admin_key is not None

    def clear_cache(self) -> None:
        """Look keys and limits up again, after a change of keys, tenants or limits."""
        self._keys.clear_cache()
        self._limits.clear_cache()

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

    def _limits_of(self, tenant: str) -> TenantLimits | None:
        try:
            return self._tenants.get(tenant).limits
        except AbsentError:
            return None


def no_tenant(name: str) -> NotFoundError:
    """The error for a tenant that is absent, or another's."""
    return NotFoundError(f"there is no tenant {name[:MAX_NAME]}", "X-Tenant")
