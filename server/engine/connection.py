"""The engine process's end of its connection to the API process."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from enum import Enum

import msgspec

from server.engine import frames
from server.engine.messages import EngineConfig, FromEngine, ToEngine

LEAVE_WITHIN_S = 5.0  # after the front has gone, whatever the main thread is doing

log = logging.getLogger(__name__)


class Signal(Enum):
    """What the inbox holds beside messages."""

    WAKE = "an adapter was loaded"
    CLOSED = "the front has gone"


class Connection:
    """The front's socket; `inbox` is what came in. What it does not take at once a thread writes, in order."""

    def __init__(self, descriptor: int) -> None:
        self.inbox: queue.SimpleQueue[ToEngine | Signal] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_behind, self._lock = 0, threading.Lock()  # frames that the writer has, or a part of one
        self._socket = socket.socket(fileno=descriptor)
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)

    def start(self) -> EngineConfig | None:
        """The first frame; then start both threads. None where the front has gone already."""
        config: EngineConfig | None = frames.read(self._socket, msgspec.msgpack.Decoder(EngineConfig))
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._writer.start()
        return config

    def send(self, message: FromEngine) -> None:
        """Write a message: a thread that did so would take Python's lock from the next step's planning."""
        frame = frames.encode(message)
        with self._lock:
            if not self._num_behind:
                frame = frame[self._send_now(frame) :]
            if frame:
                self._num_behind += 1
                self._outbox.put(frame)

    def _send_now(self, frame: bytes) -> int:
        """How much of it the socket took without waiting."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            log.info("the front went away while it was written to")
            return len(frame)

    def wake(self) -> None:
        """Wake whoever waits for the inbox; from any thread."""
        self.inbox.put(Signal.WAKE)

    def close(self) -> None:
        """Write what is left, then close."""
        self._outbox.put(None)
        self._writer.join(LEAVE_WITHIN_S)
        self._socket.close()

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        try:
            while (message := frames.read(self._socket, decoder)) is not None:
                self.inbox.put(message)
        except (OSError, msgspec.MsgspecError) as error:
            log.error("the connection to the front broke", extra={"reason": str(error)})
        self.inbox.put(Signal.CLOSED)
        time.sleep(LEAVE_WITHIN_S)  # a daemon: it ends sooner with the main thread
        os._exit(1)  # the main thread is stuck in a load or a step; nobody is there to wait for it

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._socket.sendall(frame)
                with self._lock:
                    self._num_behind -= 1
        except OSError:
            log.info("the front went away while it was written to")
