"""The loads of artifacts into host memory that run in other threads, and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar


class SizedAdapter(Protocol):
    """A packed adapter in host memory, in the layout of a slot."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in host memory and in a slot."""
        ...


P = TypeVar("P", bound=SizedAdapter)


class Spawner(Protocol):
    """Starts functions in other threads; `server.engine.adapters.loader_threads.LoaderThreads` does."""

    def spawn(self, fn: Callable[[], None]) -> None:
        """Run a function, which must not raise, in another thread as soon as one is free."""
        ...


@dataclass
class LoadResult(Generic[P]):
    """The result of one load: a packed adapter, or the error that the load raised, after `seconds`."""

    digest: str
    seconds: float
    packed: P | None = None
    error: Exception | None = None


class LoadQueue(Generic[P]):
    """Runs `load` (digest -> packed adapter) in a spawner's threads; `on_loaded` is called there after each load."""

    def __init__(
        self,
        load: Callable[[str], P],
        spawner: Spawner,
        clock: Callable[[], float],
        on_loaded: Callable[[], None],
    ) -> None:
        self.num_running = 0  # loads whose results have not been taken yet
        self._load, self._spawner, self._clock, self._on_loaded = load, spawner, clock, on_loaded
        self._results: SimpleQueue[LoadResult[P]] = SimpleQueue()

    def start(self, digest: str) -> None:
        """Start the load of a digest."""
        self.num_running += 1
        self._spawner.spawn(partial(self._run, digest))

    def results(self) -> Iterator[LoadResult[P]]:
        """Yield the results of the loads that have ended since the last call."""
        try:
            while True:
                result = self._results.get_nowait()
                self.num_running -= 1
                yield result
        except Empty:
            return

    def _run(self, digest: str) -> None:
        """Load in the calling thread, and queue the result even if the load raises."""
        began = self._clock()
        packed, error = None, None
        try:
            packed = self._load(digest)
        except Exception as raised:  # noqa: BLE001 - nothing that an artifact contains may end the engine
            error = raised
        self._results.put(LoadResult(digest, self._clock() - began, packed, error))
        self._on_loaded()
