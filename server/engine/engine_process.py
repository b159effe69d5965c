"""An engine process as the API process sees it: its messages, and the signs that it hangs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from server.engine import frames
from server.engine.messages import Beat, EngineConfig, FromEngine, ToEngine

TICK_S = 0.25  # between two looks at an engine's silence
IDLE_SHARE = 0.01  # of one core: a step that computes uses more


@dataclass(frozen=True, kw_only=True)
class Patience:
    """The client's time limits, in seconds."""

    first_retry: float = 0.5  # from a death to the next start; it doubles with each death in a row
    max_retry: float = 30.0
    good_life: float = 60.0  # an engine that lived so long resets the wait to `first_retry`
    loading: float = 900.0  # from start to ready, with the base on a cold disk
    silence: float = 4.0  # without any message: beats come every second, also during a long step
    idle_step: float = 15.0  # a step or a load that uses no CPU
    step: float = 600.0  # any step
    closing: float = 5.0  # from SIGKILL to the end


@dataclass
class EngineProcess:
    """A process, the connection to it, and how long it has been silent; `verdict` is the reason why it is ended."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoder: msgspec.msgpack.Decoder[FromEngine] = field(default_factory=lambda: msgspec.msgpack.Decoder(FromEngine))
    silent_s: float = 0.0  # since the last message
    step_s: float = 0.0  # since the last message of the thread that steps
    cpu_seconds: float = 0.0  # that the process had used at the last beat
    idle_s: float = 0.0  # of `step_s`, in which it used next to no CPU
    verdict: str | None = None

    async def read(self) -> FromEngine | None:
        """Read the next message; None at the end. Raises `OSError` and `msgspec.MsgspecError`."""
        message: FromEngine | None = await frames.read_async(self.reader, self.decoder)
        self.silent_s = 0.0
        if isinstance(message, Beat):
            seconds, self.cpu_seconds = message.cpu_seconds - self.cpu_seconds, message.cpu_seconds
            self.idle_s = 0.0 if seconds > IDLE_SHARE else self.idle_s
        else:
            self.step_s = self.idle_s = 0.0
        return message

    def write(self, message: ToEngine | EngineConfig) -> None:
        """Send a message, unless the connection is closed."""
        if not self.writer.is_closing():
            self.writer.write(frames.encode(message))

    async def watch(self, patience: Patience) -> None:
        """Cut the connection to an engine that hangs.

        Its silence is counted in ticks, not by the clock: if this process was stopped or starved, so may have been the
        engine, whose messages are then still to be read.
        """
        while self.verdict is None:
            await asyncio.sleep(TICK_S)
            self._tick(TICK_S)
            self.verdict = self._overdue(patience)
        self.writer.transport.abort()

    def _tick(self, seconds: float) -> None:
        self.silent_s += seconds
        self.step_s += seconds
        self.idle_s += seconds

    def _overdue(self, patience: Patience) -> str | None:
        """Say why the engine counts as one that hangs, or None if it does not."""
        if self.silent_s >= patience.silence:
            return f"the engine said nothing for {patience.silence:g} s and was ended"
        if self.idle_s >= patience.idle_step:
            return f"a step of the engine did nothing for {patience.idle_step:g} s, and it was ended"
        is_slow = self.step_s >= patience.step
        return f"a step of the engine took over {patience.step:g} s, and it was ended" if is_slow else None
