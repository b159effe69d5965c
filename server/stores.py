"""Stores: the places of all that this server keeps, each with the dependency that its blocking calls go through."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.registry.registry import Registry
from adapters_store.registry.tenants import Tenants
from adapters_store.storage.directory import Blobs
from server.dependency import Dependency


@dataclass(frozen=True)
class Stores:
    """The registry and its tenants, called through `database`, and the artifacts, called through `storage`."""

    registry: Registry
    tenants: Tenants
    blobs: Blobs
    database: Dependency
    storage: Dependency

    def require_up(self) -> None:
        """Raise `RegistryDownError` or `StoreDownError` if one of both did not answer when it was last called."""
        self.database.require_up()
        self.storage.require_up()

    @property
    def failure(self) -> str | None:
        """The reason why one of both cannot be used as it should, for the operator."""
        return self.database.failure or self.storage.failure
