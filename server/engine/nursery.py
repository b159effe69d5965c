"""A process that forks others on request, also once the process that asks has threads.

No thread runs in it when it forks, so that what it forks is whole; what it has in memory by then is shared with it.
Each child gets one end of a socket pair whose other end the asker holds, and ends with it.
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
from typing import NoReturn

import psutil

log = logging.getLogger(__name__)

STANDARD = 2  # descriptors up to this are the standard streams
PID = struct.Struct("<q")
END_WITHIN_S = 5.0  # from SIGKILL
FORK_TICK_S, FORK_IDLE_S = 0.5, 4.0  # of a process that is asked to fork, and neither does nor waits for a core
CAN_FORK = hasattr(os, "fork") and hasattr(os, "pidfd_open")


class Child:
    """A process of the nursery; `socket` is the asker's end of the pair. Raises `OSError` if it has ended already."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid, self.socket = pid, end
        self._handle = os.pidfd_open(pid)  # never another process's, even if its number is used again

    def kill(self) -> None:
        """End the process, whatever it does, and return when it has ended; the socket stays. To be called once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        try:
            has_ended = select.poll()  # `select.select` takes no descriptor over 1023
            has_ended.register(self._handle, select.POLLIN)
            has_ended.poll(1000 * END_WITHIN_S)
        finally:
            os.close(self._handle)


class Nursery:
    """The asker's side. `run` is called in each child with its end of the pair; the child ends when it returns."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._socket, self._lock = pid, connection, threading.Lock()
        set_tick(connection, FORK_TICK_S)

    @classmethod
    def fork(cls, run: Callable[[socket.socket], None]) -> Nursery | None:
        """Start the process; None if the system has no fork. To be called before torch has started threads."""
        if not CAN_FORK:
            return None
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            keep_only(theirs.fileno())
            serve(theirs, run)
        theirs.close()
        return cls(pid, ours)

    def spawn(self) -> Child:
        """Start a child; callable from any thread. Raises `OSError` if the nursery hangs, or it or the child ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._socket, [b"\0"], [theirs.fileno()])
                reply = self._reply()
            if len(reply) < PID.size:
                raise ConnectionResetError("the process that forks has ended")
            return Child(PID.unpack(reply)[0], ours)
        except OSError:
            ours.close()
            raise

    def _reply(self) -> bytes:
        """Wait for the child's number. A process that hangs is ended, and `TimeoutError` raised."""
        idle = IdleTime(self.pid)
        while True:
            try:
                return self._socket.recv(PID.size, socket.MSG_WAITALL)
            except BlockingIOError:  # nothing came within a tick
                if idle.after(FORK_TICK_S) >= FORK_IDLE_S:
                    os.kill(self.pid, signal.SIGKILL)
                    self.close()
                    raise TimeoutError(f"the process that forks did nothing for {FORK_IDLE_S:g} s") from None

    def close(self) -> None:
        """Make the process end, and wait until it has."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def receive(connection: socket.socket) -> int | None:
    """Wait for the descriptor that the asker sends for a child; None if it has closed its socket."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    return descriptors[0] if descriptors else None


def serve(connection: socket.socket, run: Callable[[socket.socket], None]) -> NoReturn:
    """Fork a child for each descriptor that comes, until the asker closes its socket; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, _reap)
        while (descriptor := receive(connection)) is not None:
            pid = os.fork()
            if not pid:
                _run_child(descriptor, run)
            os.close(descriptor)
            connection.sendall(PID.pack(pid))
        code = 0
    except BaseException:  # nothing of the asker's stack above may run here
        log.exception("the process that forks ends")
    finally:
        _reap()
        os._exit(code)


def _reap(*_signal: object) -> None:
    """Take note of the children that have ended, so that none becomes a zombie."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            if code:
                log.warning("a forked process has ended", extra={"pid": ended[0], "code": code})


def _run_child(descriptor: int, run: Callable[[socket.socket], None]) -> None:
    """Run a child until it returns or the asker closes its end of the pair, whatever the child waits for then."""
    code = 1
    try:
        keep_only(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection = socket.socket(fileno=descriptor)
        threading.Thread(target=_end_with_asker, args=(descriptor,), daemon=True).start()
        run(connection)
        code = 0
    except BaseException:
        log.exception("a forked process ends")
    finally:
        os._exit(code)


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


class IdleTime:
    """Tells a process that hangs from one that is slow: it neither has a core nor waits for one."""

    def __init__(self, pid: int) -> None:
        self._pid, self._busy_s, self._seconds = pid, busy_seconds(pid), 0.0

    def after(self, seconds: float) -> float:
        """Return for how long the process has been idle by now, so many seconds after the last call."""
        before, self._busy_s = self._busy_s, busy_seconds(self._pid)
        self._seconds = 0.0 if self._busy_s > before else self._seconds + seconds
        return self._seconds


def set_tick(connection: socket.socket, seconds: float) -> None:
    """Make a read raise `BlockingIOError` once nothing comes for so long: the kernel's limit, not Python's.

    So one call waits for all that is read, without waking at every part.
    """
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def busy_seconds(pid: int) -> float:
    """Sum the seconds that the threads of a process had a core or waited for one, if the system tells the latter."""
    times = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    if not times:
        return cpu_seconds(pid)
    total = 0
    for path in times:
        with contextlib.suppress(OSError):  # a thread that has ended
            total += sum(map(int, path.read_text().split()[:2]))
    return 1e-9 * total


def cpu_seconds(pid: int) -> float:
    """Return the seconds of CPU that a process has used; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
