"""Loads of artifacts into host memory, in other threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)


class SizedAdapter(Protocol):
    """A patch in the layout of a slot, in host memory."""

    @property
    def num_bytes(self) -> int:
        """What it takes at either level."""
        ...


P = TypeVar("P", bound=SizedAdapter)


class Spawner(Protocol):
    """Starts functions in other threads; `server.engine.adapters.loader_threads.LoaderThreads` does."""

    def spawn(self, fn: Callable[[], None]) -> None:
        """Run a function, which must not raise, in another thread as soon as one is free."""
        ...


@dataclass
class LoadResult(Generic[P]):
    """What a loading thread brings back: a packed patch, or the error that it raised."""

    digest: str
    seconds: float
    packed: P | None = None
    error: Exception | None = None


class LoadQueue(Generic[P]):
    """Runs `load` (digest -> packed patch) on an executor; `on_loaded` is called there after each."""

    def __init__(
        self,
        load: Callable[[str], P],
        spawner: Spawner,
        clock: Callable[[], float],
        on_loaded: Callable[[], None],
    ) -> None:
        self.num_running = 0  # those not taken in yet included
        self._load, self._spawner, self._clock, self._on_loaded = load, spawner, clock, on_loaded
        self._results: SimpleQueue[LoadResult[P]] = SimpleQueue()

    def start(self, digest: str) -> None:
        """Begin a load."""
        self.num_running += 1
        self._spawner.spawn(partial(self._run, digest))

    def results(self) -> Iterator[LoadResult[P]]:
        """All loads that have ended since the last call."""
        try:
            while True:
                result = self._results.get_nowait()
                self.num_running -= 1
                yield result
        except Empty:
            return

    def _run(self, digest: str) -> None:
        """In a loading thread: whatever happens, something arrives."""
        began = self._clock()
        packed, error = None, None
        try:
            packed = self._load(digest)
        except Exception as raised:  # noqa: BLE001 - nothing that an artifact contains may end the engine
            error = raised
        self._results.put(LoadResult(digest, self._clock() - began, packed, error))
        self._on_loaded()


class LoadError(Exception):
    """A load failed in another process; the message is for users. `code` is as of the store's own errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def sentence(digest: str, error: Exception | None) -> str:
    """What went wrong with an adapter, for its users."""
    return f"adapter {digest[:12]} could not be loaded: {reason_of(digest, error)}; upload it again if this goes on"


def reason_of(digest: str, error: Exception | None) -> str:
    """Why, without paths of ours; what is of no use to users is logged."""
    if hasattr(error, "code"):  # the store's own errors are written for users
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    log.error("an adapter raised while loading", exc_info=error, extra={"digest": digest})
    return f"{type(error).__name__} (see the engine's log)"
