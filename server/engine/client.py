"""The interface through which the API process uses an engine, and what its methods raise.

`server.engine.process_client.ProcessEngineClient` implements it over an engine process that it starts and restarts;
`server.engine.fake.FakeEngineClient` needs no engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from server.engine.messages import Output, Ready, Stats, Submit
from server.errors import UnavailableError


class EngineUnavailable(Exception):  # noqa: N818 - it is a state of the engine, not a fault of the caller
    """Raised if the engine is starting, restarting or closed; the message is for users."""


class EngineStartError(Exception):
    """Raised if the first engine cannot start; the message is for the operator."""


class EngineClient(Protocol):
    """An engine as the API process sees it. All methods belong to the event loop's thread."""

    @property
    def ready(self) -> Ready | None:
        """The engine's description of itself; None while it is starting or dead."""
        ...

    @property
    def last_error(self) -> str | None:
        """The reason why no engine is ready, in a sentence for the operator."""
        ...

    @property
    def stats(self) -> Stats:
        """The latest gauges and counters, about a second old at most."""
        ...

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until an engine is likely to be ready, 1 at least: what the last start took."""
        ...

    async def start(self) -> Ready:
        """Start the engine and return its description when it is ready. Raises `EngineStartError`."""
        ...

    async def close(self) -> None:
        """End the engine; running requests fail with `engine_restarting`."""
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[Output]:
        """Yield the outputs of one sequence; the last has `finish_reason` or `failure`. Closing the iterator aborts.

        If the engine dies meanwhile, the next one goes on with the answer. Raises `EngineUnavailable` at the first
        iteration if no engine is ready.
        """
        ...

    def discard(self, digest: str) -> None:
        """Drop the engine's copies of a deleted artifact as soon as no sequence uses it."""
        ...

    def stage(self, digest: str, folder: str | None) -> None:
        """Load an artifact from a folder of the staging area from now on; None: from the store again."""
        ...

    def keep_resident(self, digests: list[str]) -> None:
        """Keep these in slots even if no sequence uses them, the most important first; replaces the previous list."""
        ...

    def renew(self, digest: str) -> None:
        """Forget the load failures of an artifact that was uploaded again: its next load may start at once."""
        ...

    async def residency(self) -> dict[str, str]:
        """Return the state of each digest: `loading`, `host`, `slot`, `failed` or `quarantined`.

        Absent ones are left out; without an engine the answer is empty.
        """
        ...


def require_ready(client: EngineClient) -> Ready:
    """The engine's description. Raises `UnavailableError` while no engine is ready."""
    if client.ready is None:
        raise UnavailableError(client.last_error or "the engine is starting", retry_after=client.retry_after_s)
    return client.ready
