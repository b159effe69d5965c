"""The seam between the front and the engine: submit -> outputs, abort, residency, stats.

`ProcessEngineClient` keeps an engine process alive: it starts one, and when that one dies it tells every running
request so at once and starts another, later each time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Protocol

from server.engine.messages import Output, Ready, Stats, Submit

log = logging.getLogger(__name__)


class EngineUnavailable(Exception):  # noqa: N818 - it is a state of the engine, not a fault of the caller
    """No engine is ready: it is starting, restarting or closed."""


class EngineStartError(Exception):
    """The first engine could not start; the message is for the operator."""


class EngineClient(Protocol):
    """What the front knows of the engine. The fake that ships is `server.engine.fake.FakeEngineClient`."""

    @property
    def ready(self) -> Ready | None:
        """The engine's own description; None while it is starting or dead."""
        ...

    @property
    def last_error(self) -> str | None:
        """Why there is no engine, in a sentence for the operator."""
        ...

    @property
    def stats(self) -> Stats:
        """The latest gauges and counters."""
        ...

    async def start(self) -> None:
        """Return when the engine is ready. Raises `EngineStartError`."""
        ...

    async def close(self) -> None:
        """End the engine; running requests fail with `engine_restarting`."""
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[Output]:
        """The outputs of one sequence; the last has `finish_reason` or `failure`. Closing the iterator aborts.

        Raises `EngineUnavailable` at the first step where no engine is ready.
        """
        ...

    def discard(self, digest: str) -> None:
        """The artifact was deleted: drop what is kept of it once nothing uses it."""
        ...

    def stage(self, digest: str, folder: str | None) -> None:
        """Read the artifact from a folder of the staging area; None: from the store, as before."""
        ...

    def keep_resident(self, digests: list[str]) -> None:
        """These stay in slots while nobody asks for them, too, the first before the others; no others do."""
        ...

    def renew(self, digest: str) -> None:
        """The artifact was uploaded again: what failed before may be tried again at once."""
        ...

    async def residency(self) -> dict[str, str]:
        """Where each digest is: `loading`, `host`, `slot`, `failed` or `quarantined`; empty without an engine."""
        ...
