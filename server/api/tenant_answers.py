"""Answers about tenants, keys, use and changes, as the OpenAPI document describes them; see `answers`."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12

from server.api.answers import UseAnswer

Scope = Literal["generate", "deploy", "admin"]


class LimitsAnswer(TypedDict):
    """A tenant's limits; null is none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_running: int | None
    max_queued: int | None
    max_adapters: int | None
    max_bytes: int | None
    share: float


class TenantAnswer(TypedDict):
    """A tenant with its limits and what it holds."""

    name: str
    created: float
    limits: LimitsAnswer
    num_adapters: int
    bytes: int


class TenantsAnswer(TypedDict):
    """A page of the tenants that the key may see; `next` is the `after` of the next one."""

    tenants: list[TenantAnswer]
    next: str | None


class KeyAnswer(TypedDict):
    """A key without its secret."""

    id: str
    tenant: str
    scopes: list[Scope]
    note: str
    created: float


class NewKeyAnswer(KeyAnswer):
    """A key with its secret, which is never shown again."""

    key: str


class KeysAnswer(TypedDict):
    """The keys of a tenant."""

    keys: list[KeyAnswer]


class UsageRow(UseAnswer):
    """The use of a version of a tenant's task; version 0 of `base` is the base."""

    tenant: str
    task: str
    version: int


class UsagesAnswer(TypedDict):
    """A page of use by tenant, task and version; `next` is the `after` of the next one."""

    usage: list[UsageRow]
    next: str | None


class ChangeAnswer(TypedDict):
    """A change: who did what, and when (Unix seconds); the keys of `what` depend on `action`."""

    number: int
    at: float
    actor: str
    tenant: str
    action: str
    what: dict[str, Any]
    request_id: str | None


class ChangesAnswer(TypedDict):
    """A page of changes, the newest first."""

    changes: list[ChangeAnswer]
