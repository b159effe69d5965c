"""Listening and leaving: the socket is bound before anything loads, and a stop is a drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Coroutine
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from server.http_protocol import BoundedProtocol
from server.settings import Settings

if TYPE_CHECKING:  # the engine starts before these are imported: they bring torch, which takes a second
    from fastapi import FastAPI

    from server.engine.client import EngineClient
    from server.state import ServerState

log = logging.getLogger(__name__)
T = TypeVar("T")

FAREWELL_S = 5.0  # requests that are cut off get their error in this time
NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of every address of `host`, bound but not listening: who connects before all is loaded is refused.

    With port 0 all have the first one's port. Raises `OSError`, which says what to do.
    """
    bound: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((found[0], found[4]) for found in _addresses(host, port)):
            chosen = port or (bound[0].getsockname()[1] if bound else 0)
            with contextlib.ExitStack() as unless_bound:
                listener = unless_bound.enter_context(_tcp_socket(family))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address[0], chosen, *address[2:]))
                bound.append(listener)
                unless_bound.pop_all()
    except OSError as error:
        if not bound or error.errno not in NO_SUCH_ADDRESS:  # localhost may lack IPv6
            for listener in bound:
                listener.close()
            raise OSError(error.errno, f"{error.strerror}: cannot listen on {host} port {port}") from None
    return bound


def _tcp_socket(family: int) -> socket.socket:
    """Make a socket that names its protocol: asyncio's own loop else leaves Nagle's delay on, 40 ms an answer."""
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)


def _addresses(host: str, port: int) -> list[Any]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted(found, key=lambda one: one[0] != socket.AF_INET)


class DrainingServer(uvicorn.Server):
    """Stops in three steps: new work is refused with 503, running requests get `drain_s`, the rest gets an error.

    Health and metrics are answered until the end. A second signal ends it at once, and so does one that comes while the
    base still loads.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=int(FAREWELL_S),
            )
        )
        self._app, self._drain_s = app, settings.drain_s
        self._drained_by: float | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def _state(self) -> ServerState | None:
        return getattr(self._app.state, "server", None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's own
        """Start to drain, or end at once at a second signal. The signal is not raised again: this is no failure."""
        if self._state is None or not self.started:
            self.should_exit = True
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._give_up_start)  # what a signal's handler may call: it wakes the loop
        elif self._drained_by is not None:
            self.should_exit = self.force_exit = True
        else:
            self._state.is_draining = True
            self._drained_by = time.monotonic() + self._drain_s
            log.info("draining", extra={"running": len(self.server_state.tasks), "drain_s": self._drain_s})

    @property
    def is_start_given_up(self) -> bool:
        """Whether a signal ended the server before it was ready."""
        return self._closing is not None

    def _give_up_start(self) -> None:
        if self._closing is None:
            log.info("the start is given up at a signal")
            engine: EngineClient = self._app.state.engine
            self._closing = asyncio.create_task(engine.close())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application. One that a signal gives up ends with that one line, and no traceback of uvicorn's."""
        logger = logging.getLogger("uvicorn.error")
        logger.addFilter(self._is_news)
        try:
            await super().startup(sockets)
        finally:
            logger.removeFilter(self._is_news)

    def _is_news(self, _record: logging.LogRecord) -> bool:
        return not self.is_start_given_up

    async def on_tick(self, counter: int) -> bool:
        """End the server once the drain has ended; called ten times a second."""
        if self._drained_by is not None and not self.should_exit:
            is_late = time.monotonic() >= self._drained_by
            if is_late and self._state is not None:
                log.warning("what still runs is ended", extra={"running": len(self.server_state.tasks)})
                await self._state.client.close()  # running requests get an error with a code
            self.should_exit = is_late or not self.server_state.tasks
        return await super().on_tick(counter)


def run(serve: Coroutine[Any, Any, T], sockets: list[socket.socket]) -> T:
    """Run `serve` to its end in uvicorn's kind of loop, then close the sockets. Returns its result."""
    with contextlib.ExitStack() as stack:
        for listener in sockets:
            stack.enter_context(listener)
        with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
            return runner.run(serve)


def address_of(host: str, sockets: list[socket.socket]) -> str:
    """The URL at which this machine reaches the server."""
    port: int = sockets[0].getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
