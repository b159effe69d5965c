"""Frames on a socket: a 4-byte big-endian length in bytes, then one msgpack message of that length."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

MAX_FRAME_BYTES = 256 * 2**20
_HEAD_BYTES = 4
_ENCODER = msgspec.msgpack.Encoder()


class FrameError(ConnectionError):
    """Raised if the other side broke the framing; the connection cannot be used any more."""


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as one frame."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(_HEAD_BYTES, "big") + body


def _size(head: bytes) -> int:
    size = int.from_bytes(head, "big")
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes is larger than {MAX_FRAME_BYTES}")
    return size


def read(connection: socket.socket, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """Read the next message, blocking; None at the end of the connection.

    Raises `FrameError`, `OSError`, and `msgspec.MsgspecError` if the message is not one of the decoder's types.
    """
    head = _read_exactly(connection, _HEAD_BYTES)
    body = None if head is None else _read_exactly(connection, _size(head))
    return None if body is None else decoder.decode(body)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 2**20))
        if not part:
            return None
        parts += part
    return bytes(parts)


async def read_async(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """Read the next message as `read` does, without blocking the event loop."""
    try:
        head = await reader.readexactly(_HEAD_BYTES)
        return decoder.decode(await reader.readexactly(_size(head)))
    except asyncio.IncompleteReadError:
        return None
