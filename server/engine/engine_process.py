"""Engine processes as the API process sees them: how one is started, its messages, and the signs that it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from server.engine import frames
from server.engine.client import EngineStartError
from server.engine.messages import Beat, EngineConfig, FromEngine, StepDone, ToEngine
from server.engine.nursery import PID, Child, IdleTime, cpu_seconds
from server.settings import engine_environment

TICK_S = 0.25  # between two looks at an engine's silence
IDLE_SHARE = 0.01  # of one core: a step that computes uses more


@dataclass(frozen=True, kw_only=True)
class Patience:
    """The client's time limits, in seconds."""

    first_retry: float = 0.5  # from a death to the next start; it doubles with each death in a row
    max_retry: float = 30.0
    good_life: float = 60.0  # an engine that lived so long resets the wait to `first_retry`
    loading: float = 900.0  # from start to ready, with the base on a cold disk
    forking: float = 60.0  # from start to ready, with the base in memory
    silence: float = 4.0  # without any message: beats come every second, also during a long step
    idle_step: float = 15.0  # a step or a load that uses no CPU
    step: float = 600.0  # any step
    closing: float = 5.0  # until a process has ended that was told to


class EngineParent:
    """The process that loads the base, and that forks engines or becomes one; see `server.engine.worker`.

    It inherits one end of a socket pair, so that no other process can ever connect.
    """

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process, self._control = process, control
        self.num_engines = 0

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, by itself or killed."""
        return self._process.returncode is not None

    @classmethod
    async def start(cls, command: Sequence[str], config: EngineConfig) -> EngineParent:
        """Start the process, which begins to load. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command, "--socket", str(theirs.fileno()), pass_fds=(theirs.fileno(),), env=engine_environment()
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        with contextlib.suppress(OSError):  # it has ended already, and `spawn` says so
            await asyncio.get_running_loop().sock_sendall(ours, frames.encode(config))
        return cls(process, ours)

    async def spawn(self, patience: Patience) -> EngineProcess:
        """Start an engine; the first waits for the base to be loaded. Raises `EngineStartError` and `OSError`."""
        self.num_engines += 1
        ours, theirs = socket.socketpair()
        try:
            with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            child = Child(await self._pid(patience), ours)
            return EngineProcess(child, *await asyncio.open_unix_connection(sock=ours), child.pid == self._process.pid)
        except BaseException:
            ours.close()
            raise

    async def _pid(self, patience: Patience) -> int:
        """Wait for the number of the engine. The process is killed if it hangs, as it may not while it loads."""
        answer, idle = asyncio.create_task(self._reply()), IdleTime(self._process.pid)
        try:
            while not (await asyncio.wait({answer}, timeout=TICK_S))[0]:
                if idle.after(TICK_S) >= patience.silence and self.num_engines > 1:
                    self._process.kill()
                    message = f"the process that holds the base did nothing for {patience.silence:g} s, and was ended"
                    raise EngineStartError(message)
            reply = await answer
        finally:
            answer.cancel()
        if len(reply) < PID.size:
            code = await self._process.wait()
            raise EngineStartError(f"the engine process ended with code {code} before it was ready; see its log")
        return int(PID.unpack(reply)[0])

    async def _reply(self) -> bytes:
        with contextlib.suppress(ConnectionResetError):  # it ended with our message unread
            return await asyncio.get_running_loop().sock_recv(self._control, PID.size)
        return b""

    async def end(self, within_s: float) -> None:
        """Tell the process to end, and kill it after a while, or at once if it is still loading."""
        self._control.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._process.wait()
                return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@dataclass
class EngineProcess:
    """A process, the connection to it, and how long it has been silent; `verdict` is the reason why it is ended."""

    child: Child
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_parent: bool = False  # it is what loaded the base: the next engine loads it again
    has_answered: bool = False  # anything to a request
    decoder: msgspec.msgpack.Decoder[FromEngine] = field(default_factory=lambda: msgspec.msgpack.Decoder(FromEngine))
    silent_s: float = 0.0  # since the last message
    step_s: float = 0.0  # since the last message of the thread that steps
    cpu_s: float = 0.0  # that the process had used at the last tick
    idle_s: float = 0.0  # of `step_s`, in which it used next to no CPU
    verdict: str | None = None

    async def read(self) -> FromEngine | None:
        """Read the next message; None at the end. Raises `OSError` and `msgspec.MsgspecError`."""
        message: FromEngine | None = await frames.read_async(self.reader, self.decoder)
        self.silent_s = 0.0
        if not isinstance(message, Beat):
            self.step_s = self.idle_s = 0.0
            self.has_answered |= isinstance(message, StepDone) and bool(message.outputs)
        return message

    def write(self, message: ToEngine) -> None:
        """Send a message, unless the connection is closed."""
        if not self.writer.is_closing():
            self.writer.write(frames.encode(message))

    async def end(self) -> None:
        """Close the connection and kill the process: it heeds no SIGTERM, and has nothing to leave behind."""
        self.writer.transport.abort()  # not `close`: what is still to be written will not be read
        with ThreadPoolExecutor(1) as its_own:  # the loop's may be full of calls that hang
            await asyncio.get_running_loop().run_in_executor(its_own, self.child.kill)

    async def watch(self, patience: Patience) -> None:
        """Cut the connection to an engine that hangs.

        Its silence is counted in ticks, not by the clock: if this process was stopped or starved, so may have been the
        engine, whose messages are then still to be read. An engine that computes is not silent: while a kernel runs,
        no other thread of it may speak.
        """
        while self.verdict is None:
            await asyncio.sleep(TICK_S)
            self._tick(TICK_S, cpu_seconds(self.child.pid))
            self.verdict = self._overdue(patience)
        self.writer.transport.abort()

    def _tick(self, seconds: float, cpu_s: float) -> None:
        is_computing = cpu_s - self.cpu_s > IDLE_SHARE * seconds
        self.cpu_s = cpu_s
        self.step_s += seconds
        self.silent_s = 0.0 if is_computing else self.silent_s + seconds
        self.idle_s = 0.0 if is_computing else self.idle_s + seconds

    def _overdue(self, patience: Patience) -> str | None:
        """Say why the engine counts as one that hangs, or None if it does not."""
        if self.silent_s >= patience.silence:
            return f"the engine said nothing for {patience.silence:g} s and was ended"
        if self.idle_s >= patience.idle_step:
            return f"a step of the engine did nothing for {patience.idle_step:g} s, and it was ended"
        is_slow = self.step_s >= patience.step
        return f"a step of the engine took over {patience.step:g} s, and it was ended" if is_slow else None
