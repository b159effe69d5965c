"""A process that forks others on request, also once the process that asks has threads.

It is forked before torch has started threads and starts none, so that what it forks is whole; what was imported by then
is shared with it. Each child gets one end of a socket pair whose other end the asker holds, and ends with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

STANDARD = 2  # descriptors up to this are the standard streams
PID = struct.Struct("<q")
END_WITHIN_S = 5.0  # from SIGKILL


class Child:
    """A process of the nursery; `socket` is the asker's end of the pair. Raises `OSError` if it has ended already."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid, self.socket = pid, end
        self._handle = os.pidfd_open(pid)  # never another process's, even if its number is used again

    def kill(self) -> None:
        """End the process, whatever it does, and return when it has ended. To be called once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        select.select([self._handle], [], [], END_WITHIN_S)
        os.close(self._handle)
        self.socket.close()


class Nursery:
    """The asker's side. `run` is called in each child with its end of the pair; the child ends when it returns."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._socket, self._lock = pid, connection, threading.Lock()

    @classmethod
    def fork(cls, run: Callable[[socket.socket], None]) -> Nursery | None:
        """Start the process; None if the system has no fork. To be called before torch has started threads."""
        if not hasattr(os, "fork"):
            return None
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            _serve(theirs, run)
        theirs.close()
        return cls(pid, ours)

    def spawn(self) -> Child:
        """Start a child; callable from any thread. Raises `OSError` if the nursery or the child has ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._socket, [b"\0"], [theirs.fileno()])
                reply = self._socket.recv(PID.size, socket.MSG_WAITALL)
            if len(reply) < PID.size:
                raise ConnectionResetError("the process that starts loaders has ended")
            return Child(PID.unpack(reply)[0], ours)
        except OSError:
            ours.close()
            raise

    def close(self) -> None:
        """Make the process end, and wait until it has."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(connection: socket.socket, run: Callable[[socket.socket], None]) -> None:
    """Fork a child for each descriptor that comes, until the asker closes its socket; never returns."""
    try:
        keep_only(connection.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child becomes a zombie
        while True:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not descriptors:
                return
            pid = os.fork()
            if not pid:
                _run_child(descriptors[0], run)
            os.close(descriptors[0])
            connection.sendall(PID.pack(pid))
    except BaseException as error:  # noqa: BLE001 - nothing of the asker's stack above may run here
        log.error("the process that starts loaders ends", extra={"reason": str(error)})
    finally:
        os._exit(0)


def _run_child(descriptor: int, run: Callable[[socket.socket], None]) -> None:
    """Run a child until it returns or the asker closes its end of the pair, whatever the child waits for then."""
    try:
        keep_only(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection = socket.socket(fileno=descriptor)
        threading.Thread(target=_end_with_asker, args=(descriptor,), daemon=True).start()
        run(connection)
    except BaseException as error:  # noqa: BLE001 - as above
        log.error("a process that loads adapters ends", extra={"reason": str(error)})
    finally:
        os._exit(0)


def _end_with_asker(descriptor: int) -> None:
    hang_up = select.poll()
    hang_up.register(descriptor, 0)  # 0: only what is always told, such as POLLHUP
    hang_up.poll()
    os._exit(0)


def keep_only(descriptor: int) -> None:
    """Close the inherited descriptors but the standard streams, or the API process would not see the engine end."""
    for inherited in sorted(int(path.name) for path in Path("/dev/fd").iterdir()):
        if inherited > STANDARD and inherited != descriptor:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(inherited)
