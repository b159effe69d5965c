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
from server.engine.messages import FromEngine, ToEngine

LEAVE_WITHIN_S = 5.0  # after the API process has gone, whatever the main thread is doing

log = logging.getLogger(__name__)


class Signal(Enum):
    """Events that the inbox holds beside messages."""

    WAKE = "an adapter was loaded"
    CLOSED = "the API process has gone"


class Connection:
    """A socket to the API process: a thread reads messages into `inbox`, and another finishes blocked writes.

    Frames leave in the order of `send`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[ToEngine | Signal] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_behind, self._lock = 0, threading.Lock()  # frames that the writer has, or a part of one
        self._socket = connection
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()

    def start_reading(self) -> None:
        """Begin to fill the inbox."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        """Send a message.

        It is written here if the socket has room: handing every frame to a thread would contend for the GIL with the
        planning of the next step.
        """
        frame = frames.encode(message)
        with self._lock:
            if not self._num_behind:
                frame = frame[self._send_now(frame) :]
            if frame:
                self._num_behind += 1
                self._outbox.put(frame)

    def _send_now(self, frame: bytes) -> int:
        """Write without waiting; returns the number of bytes that the socket took."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            log.info("the API process went away while it was written to")
            return len(frame)

    def wake(self) -> None:
        """Wake the thread that waits for the inbox; callable from any thread."""
        self.inbox.put(Signal.WAKE)

    def close(self) -> None:
        """Write the frames that are left, for `LEAVE_WITHIN_S` at most, then close the socket."""
        self._outbox.put(None)
        self._writer.join(LEAVE_WITHIN_S)
        self._socket.close()

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        try:
            while (message := frames.read(self._socket, decoder)) is not None:
                self.inbox.put(message)
        except (OSError, msgspec.MsgspecError) as error:
            log.error("the connection to the API process broke", extra={"reason": str(error)})
        self.inbox.put(Signal.CLOSED)
        time.sleep(LEAVE_WITHIN_S)  # a daemon: it ends sooner with the main thread
        os._exit(1)  # the main thread is stuck in a load or a step, whose result no one will read

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._socket.sendall(frame)
                with self._lock:
                    self._num_behind -= 1
        except OSError:
            log.info("the API process went away while it was written to")
