"""A proxy on loopback that spoils connections: bytes come late or in drops, are cut off, or the connection is reset."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

CHUNK = 2**14
HUNG_EVERY_S = 0.02  # how often it is asked whether to go on
RESET = struct.pack("ii", 1, 0)  # linger for no time: closing resets


@dataclass
class Fault:
    """What happens to one direction: `delay_s` before each of the parts of `chunk` bytes, and an end after `cut_at`.

    An end closes the connection, or resets it where `is_reset`. While `is_hung` no byte passes, and nothing is closed.
    """

    delay_s: float = 0.0
    chunk: int = CHUNK
    cut_at: int | None = None
    is_reset: bool = False
    is_hung: bool = False


@dataclass
class Proxy:
    """Where it listens, and what it does; to be changed at any time."""

    url: str
    up: Fault
    down: Fault
    num_connections: int = 0


@asynccontextmanager
async def proxy(host: str, port: int, up: Fault | None = None, down: Fault | None = None) -> AsyncIterator[Proxy]:
    """A proxy before a server; `up` spoils what clients send, `down` what the server answers."""
    made = Proxy("", up or Fault(), down or Fault())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.num_connections += 1
        with contextlib.suppress(OSError):
            theirs, ours = await asyncio.open_connection(host, port)
            sides = [_pump(reader, ours, made.up), _pump(theirs, writer, made.down)]
            tasks = [asyncio.create_task(side) for side in sides]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                is_reset = made.up.is_reset or made.down.is_reset
                for side in (writer, ours):
                    _close(side, is_reset)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    num_bytes = 0
    while data := await reader.read(fault.chunk):
        while fault.is_hung:
            await asyncio.sleep(HUNG_EVERY_S)
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.cut_at is not None and num_bytes + len(data) > fault.cut_at:
            writer.write(data[: fault.cut_at - num_bytes])
            await writer.drain()
            return
        writer.write(data)
        await writer.drain()
        num_bytes += len(data)


def _close(writer: asyncio.StreamWriter, is_reset: bool) -> None:
    if is_reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    else:
        writer.close()
