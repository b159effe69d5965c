"""A database or a store of artifacts that stops answering, without an error and without closing a connection.

`Valve` stops calls within this process, whatever is behind them; over a real service `tests.kit.proxy` with a fault of
`is_hung` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event

from adapters_store.storage.directory import Blobs
from server.stores import Stores


class Valve:
    """Lets calls through until `close`, and those that wait and later ones from `open` on."""

    def __init__(self) -> None:
        self._flow = threading.Event()
        self._flow.set()
        self.close, self.open = self._flow.clear, self._flow.set

    def wait(self, *_arguments: object) -> None:
        """Return once the valve is open."""
        self._flow.wait()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which waits first."""

        def waiting(*arguments: Any, **named: Any) -> Any:
            self.wait()
            return function(*arguments, **named)

        return waiting


def valve_of_database(stores: Stores) -> Valve:
    """A valve before every transaction of the registry and of the tenants."""
    valve = Valve()
    event.listen(stores.registry.engine, "begin", valve.wait)
    return valve


def valve_of_store(patch: pytest.MonkeyPatch) -> Valve:
    """A valve before every call of stores opened from now on, but of the staging area, which is on the local disk."""
    valve = Valve()
    for name in ("put", "files", "outline", "delete", "digests", "check"):
        patch.setattr(Blobs, name, valve.before(getattr(Blobs, name)))
    return valve
