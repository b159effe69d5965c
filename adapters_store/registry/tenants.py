"""Store tenants, their limits and keys in the registry's database. All calls are synchronous.

A key is `mh_<id>.<secret>`: the id finds its row, which has only a hash of the secret. A secret has 256 random bits,
so that a plain sha256 protects it. A deleted tenant's name is never reused: records of it, such as usage and shared KV
blocks, could be taken for the new tenant's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from adapters_store.errors import AbsentError, NameTakenError, QuotaError
from adapters_store.registry import DEFAULT_TENANT, audit
from adapters_store.registry.database import keys, routes, tasks, tenants, transaction, versions

MAX_KEYS = 1000  # of a tenant
KEY = re.compile(r"(mh_[a-z0-9]{12})\.([A-Za-z0-9_-]{43})")


class TenantLimits(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A tenant's limits; None is no limit. `share` is its weight against competing tenants."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running: int | None = None
    max_queued: int | None = None
    max_adapters: int | None = None
    max_bytes: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Tenant:
    """A tenant with its number of adapters and their bytes; `created` is in Unix seconds."""

    name: str
    limits: TenantLimits
    created: float
    num_adapters: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Key:
    """A tenant's API key, without its secret; `created` is in Unix seconds."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    note: str
    created: float


@dataclass(frozen=True)
class KeyRecord:
    """The record of a key id: its tenant, scopes, limits, and the hash that its secret must have."""

    tenant: str
    scopes: frozenset[str]
    hash: str
    limits: TenantLimits

    def fits(self, secret: str) -> bool:
        """Tell if this is the key's secret, in constant time."""
        return hmac.compare_digest(hash_of(secret), self.hash)


def hash_of(secret: str) -> str:
    """Return the hash of a secret, which is all that is stored of it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into its id and secret; None if it is malformed."""
    matched = KEY.fullmatch(key)
    return None if matched is None else (matched[1], matched[2])


class Tenants:
    """The tenants and keys of an open registry."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def _read(self) -> AbstractContextManager[Connection]:
        return transaction(self._engine, is_write=False)

    def _write(self) -> AbstractContextManager[Connection]:
        return transaction(self._engine, is_write=True)

    def add(self, name: str, limits: TenantLimits | None = None) -> Tenant:
        """Add a tenant. Raises `NameTakenError`, also for the name of a deleted one."""
        with self._write() as connection:
            if (row := connection.execute(select(tenants).where(tenants.c.name == name)).first()) is not None:
                was = "exists" if row.deleted is None else "was deleted; a tenant's name is never given again"
                raise NameTakenError(f"the tenant {name} {was}")
            limits = limits or TenantLimits()
            connection.execute(
                insert(tenants).values(name=name, limits=msgspec.to_builtins(limits), created=time.time())
            )
            audit.note(connection, name, "tenant.create", limits=msgspec.to_builtins(limits))
            return self._tenant(connection, self._find(connection, name))

    def get(self, name: str) -> Tenant:
        """Return a tenant by name. Raises `AbsentError`."""
        with self._read() as connection:
            return self._tenant(connection, self._find(connection, name))

    def all(self, after: str | None = None, max_tenants: int | None = None) -> list[Tenant]:
        """Return the tenants that are not deleted, by name: all, or so many behind a name."""
        query = select(tenants).where(tenants.c.deleted.is_(None)).order_by(tenants.c.name).limit(max_tenants)
        with self._read() as connection:
            rows = connection.execute(query if after is None else query.where(tenants.c.name > after)).all()
            return [self._tenant(connection, row) for row in rows]

    def delete(self, name: str) -> list[str]:
        """Delete a tenant with its keys, tasks and versions, and return their digests; its usage stays.

        Raises `AbsentError`, and `ValueError` for the default tenant.
        """
        if name == DEFAULT_TENANT:
            raise ValueError(f"the tenant {DEFAULT_TENANT} is always there")
        with self._write() as connection:
            self._find(connection, name)
            its = select(tasks.c.id).where(tasks.c.tenant == name)
            digests = connection.execute(select(versions.c.digest).where(versions.c.task_id.in_(its))).scalars().all()
            connection.execute(delete(routes).where(routes.c.task_id.in_(its)))
            connection.execute(delete(versions).where(versions.c.task_id.in_(its)))
            connection.execute(delete(keys).where(keys.c.tenant == name))
            connection.execute(update(tenants).where(tenants.c.name == name).values(deleted=time.time()))
            audit.note(connection, name, "tenant.delete", num_versions=len(digests))
            return list(digests)

    def set_limits(self, name: str, limits: TenantLimits) -> Tenant:
        """Replace a tenant's limits. Raises `AbsentError`."""
        with self._write() as connection:
            self._find(connection, name)
            stored = msgspec.to_builtins(limits)
            connection.execute(update(tenants).where(tenants.c.name == name).values(limits=stored))
            audit.note(connection, name, "limits.set", limits=stored)
            return self._tenant(connection, self._find(connection, name))

    def add_key(self, tenant: str, scopes: list[str], note: str = "") -> tuple[Key, str]:
        """Create a key, and return it with the text to send, which is not stored.

        Raises `AbsentError`, and `QuotaError` if the tenant has as many as it may.
        """
        key_id, secret = f"mh_{secrets.token_hex(6)}", secrets.token_urlsafe(32)
        with self._write() as connection:
            self._find(connection, tenant)
            count = select(func.count()).select_from(keys).where(keys.c.tenant == tenant)
            if connection.execute(count).scalar_one() >= MAX_KEYS:
                raise QuotaError(f"the tenant {tenant} has {MAX_KEYS} keys, the most there may be: revoke some")
            values = {"scopes": sorted(set(scopes)), "note": note, "created": time.time()}
            connection.execute(insert(keys).values(id=key_id, tenant=tenant, hash=hash_of(secret), **values))
            audit.note(connection, tenant, "key.create", key=key_id, scopes=values["scopes"], note=note)
            return self._find_key(connection, tenant, key_id), f"{key_id}.{secret}"

    def keys(self, tenant: str) -> list[Key]:
        """Return a tenant's keys, the oldest first. Raises `AbsentError`."""
        with self._read() as connection:
            self._find(connection, tenant)
            query = select(keys).where(keys.c.tenant == tenant).order_by(keys.c.created, keys.c.id)
            return [_key(row) for row in connection.execute(query).all()]

    def key(self, tenant: str, key_id: str) -> Key:
        """Return a tenant's key. Raises `AbsentError`."""
        with self._read() as connection:
            return self._find_key(connection, tenant, key_id)

    def rotate_key(self, tenant: str, key_id: str) -> tuple[Key, str]:
        """Replace a key's secret, which is void then; return the key and the text to send. Raises `AbsentError`."""
        secret = secrets.token_urlsafe(32)
        with self._write() as connection:
            key = self._find_key(connection, tenant, key_id)
            connection.execute(update(keys).where(keys.c.id == key_id).values(hash=hash_of(secret)))
            audit.note(connection, tenant, "key.rotate", key=key_id)
            return key, f"{key_id}.{secret}"

    def revoke_key(self, tenant: str, key_id: str) -> None:
        """Delete a key. Raises `AbsentError`."""
        with self._write() as connection:
            self._find_key(connection, tenant, key_id)
            connection.execute(delete(keys).where(keys.c.id == key_id))
            audit.note(connection, tenant, "key.revoke", key=key_id)

    def known(self, key_id: str) -> KeyRecord | None:
        """Return the record of a key id, or None if there is no such key."""
        with self._read() as connection:
            query = select(keys, tenants.c.limits).join(tenants, keys.c.tenant == tenants.c.name)
            row = connection.execute(query.where(keys.c.id == key_id)).first()
            return None if row is None else KeyRecord(row.tenant, frozenset(row.scopes), row.hash, _limits(row.limits))

    def changes(self, tenant: str | None, before: int | None, max_entries: int) -> list[audit.AuditEntry]:
        """Return the log of changes, newest first, as `audit.entries` does."""
        with self._read() as connection:
            return audit.entries(connection, tenant, before, max_entries)

    def forget_changes(self, before: float) -> int:
        """Delete the log's entries of changes made before a Unix time; returns how many."""
        with self._write() as connection:
            return audit.forget(connection, before)

    def _find(self, connection: Connection, name: str) -> Row[Any]:
        query = select(tenants).where(tenants.c.name == name, tenants.c.deleted.is_(None))
        row = connection.execute(query).first()
        if row is None:
            raise AbsentError(f"there is no tenant {name[:63]}")
        return row

    def _tenant(self, connection: Connection, row: Row[Any]) -> Tenant:
        return Tenant(row.name, _limits(row.limits), row.created, *held(connection, row.name))

    def _find_key(self, connection: Connection, tenant: str, key_id: str) -> Key:
        self._find(connection, tenant)
        row = connection.execute(select(keys).where(keys.c.id == key_id, keys.c.tenant == tenant)).first()
        if row is None:
            raise AbsentError(f"the tenant {tenant} has no key {key_id[:16]}")
        return _key(row)


def held(connection: Connection, tenant: str) -> tuple[int, int]:
    """Return a tenant's number of versions, and their bytes."""
    counts = select(func.count(), func.coalesce(func.sum(versions.c.num_bytes), 0))
    row = connection.execute(counts.join(tasks, versions.c.task_id == tasks.c.id).where(tasks.c.tenant == tenant)).one()
    return int(row[0]), int(row[1])


def check_quota(connection: Connection, tenant: str, num_bytes: int) -> None:
    """Raise `QuotaError` if another version of `num_bytes` is over the tenant's limits.

    Raises `AbsentError` if the tenant was deleted during its upload.
    """
    row = connection.execute(select(tenants).where(tenants.c.name == tenant)).first()
    if row is None:
        return
    if row.deleted is not None:
        raise AbsentError(f"there is no tenant {tenant}")
    limits, (has_adapters, has_bytes) = _limits(row.limits), held(connection, tenant)
    if limits.max_adapters is not None and has_adapters >= limits.max_adapters:
        raise QuotaError(f"the tenant {tenant} has {has_adapters} adapters and may have {limits.max_adapters}")
    if limits.max_bytes is not None and has_bytes + num_bytes > limits.max_bytes:
        raise QuotaError(
            f"the tenant {tenant} has adapters of {has_bytes} bytes; {num_bytes} more are over its {limits.max_bytes}"
        )


def _limits(stored: dict[str, Any]) -> TenantLimits:
    return msgspec.convert(stored, TenantLimits)


def _key(row: Row[Any]) -> Key:
    return Key(row.id, row.tenant, tuple(row.scopes), row.note, row.created)
