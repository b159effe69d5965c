"""The engine's own process: `python -m server.engine.process --socket DESCRIPTOR`.

It inherits one end of the front's socket pair, reads an `EngineConfig`, loads, says `Ready` or `StartFailed`, and then
steps for as long as the front is there. A thread reads frames, another writes those that the socket does not take at
once, and the engine has the main thread. It reads no environment, and it ends when the socket closes: there are no
orphans.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import msgspec

from server import logs, memory
from server.engine import frames
from server.engine.engine import Engine
from server.engine.messages import (
    Abort,
    AskResidency,
    EngineConfig,
    Forget,
    FromEngine,
    Keep,
    Ready,
    Renew,
    Residency,
    Stage,
    StartFailed,
    StepDone,
    Submit,
    ToEngine,
)
from server.engine.own_time import own_time

log = logging.getLogger(__name__)

STATS_EVERY_S = 1.0
WAIT_FOR_ADAPTERS_S = 0.05  # deadlines are looked at so often where everything waits for adapters
SPIN_COUNT = "20000"
SWITCH_S = 5e-4
LEAVE_WITHIN_S = 5.0  # after the front has gone, whatever the main thread is doing

OnLoaded = Callable[[], None]
Build = Callable[[EngineConfig, OnLoaded], tuple[Ready, Engine[Any]]]


class Signal(Enum):
    """What the inbox holds beside messages."""

    WAKE = "an adapter was loaded"
    CLOSED = "the front has gone"


def build(config: EngineConfig, on_loaded: OnLoaded) -> tuple[Ready, Engine[Any]]:
    """The real engine: base, bank and the store's artifacts. The heavy imports are here, so that fakes need none."""
    # transformers imports it where it is, which takes 0.2 s; it spreads a base over devices, and ours is on one.
    sys.modules.setdefault("accelerate", None)  # type: ignore[arg-type]

    import torch

    from server.engine.helper import Helpers
    from server.model.loaders import Loaders
    from server.model.packed import Packed
    from server.model.runner import RunnerConfig, load

    memory.keep_imports()
    helpers = Helpers(config.num_loaders)
    loaded = load(RunnerConfig(**{name: getattr(config, name) for name in RunnerConfig.__struct_fields__}))
    helpers.begin(config.store, config.blobs, loaded.spec, loaded.bank.kept)
    staged = dict[str, str]()

    def load_adapter(digest: str) -> Packed:
        return loaded.bank.pin(helpers.load(digest, staged.get(digest)))

    engine = Engine(
        loaded.runner,
        loaded.bank,
        load_adapter,
        msgspec.structs.replace(config, max_sequence_tokens=loaded.max_sequence_tokens),
        eos_token_ids=loaded.eos_token_ids,
        executor=Loaders(config.num_loaders),
        clock=time.monotonic,
        on_loaded=on_loaded,
        staged=staged,
        own_clock=own_time(),
    )
    ready = Ready(
        spec=loaded.spec,
        eos_token_ids=loaded.eos_token_ids,
        max_sequence_tokens=engine.max_sequence_tokens,
        max_adapter_bytes=min(config.slot_bytes, config.host_bytes),
        item_bytes=loaded.bank.kept.item_bytes,
        precision=loaded.precision,
        load_seconds=loaded.load_seconds,
        largest_value=torch.finfo(loaded.bank.kept.matrices).max,
    )
    return ready, engine


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


class Service:
    """Feeds the engine from a connection, and the connection from the engine."""

    def __init__(self, engine: Engine[Any], connection: Connection) -> None:
        self.engine, self.connection = engine, connection
        self._stats_due = 0.0

    def run(self) -> None:
        """Step until the front has gone."""
        timeout = 0.0
        while True:
            for message in self._inbox(timeout):
                if message is Signal.CLOSED:
                    return
                self._handle(message)
            done = self.engine.step()
            timeout = self._timeout(is_idle=done is None)
            if done is None:
                done = self._idle()
            if done is not None:
                self._stats_due = time.monotonic() + STATS_EVERY_S
                self.connection.send(done)

    def _inbox(self, timeout: float) -> Iterator[ToEngine | Signal]:
        """All that is there; the first is waited for."""
        try:
            yield self.connection.inbox.get(timeout > 0, timeout or None)
            while True:
                yield self.connection.inbox.get_nowait()
        except queue.Empty:
            return

    def _timeout(self, is_idle: bool) -> float:
        if not is_idle:
            return 0.0
        return WAIT_FOR_ADAPTERS_S if self.engine.has_work else max(0.001, self._stats_due - time.monotonic())

    def _idle(self) -> StepDone | None:
        """Once a second: stats, and the books are checked."""
        if time.monotonic() < self._stats_due:
            return None
        self.engine.assert_consistent()
        return StepDone([], self.engine.stats())

    def _handle(self, message: ToEngine | Signal) -> None:
        match message:
            case Submit():
                self.engine.submit(message)
            case Abort():
                self.engine.abort(message.sequence_id)
            case Forget():
                self.engine.forget(message.digest)
            case Stage():
                self.engine.stage(message.digest, message.folder)
            case Keep():
                self.engine.keep(message.digests)
            case Renew():
                self.engine.renew(message.digest)
            case AskResidency():
                self.connection.send(Residency(message.query_id, self.engine.adapters.states()))
            case Signal():
                pass


def serve(descriptor: int, build: Build) -> int:
    """Load and serve until the front has gone; the exit code."""
    connection = Connection(descriptor)
    config = connection.start()
    if config is None:
        return 0
    try:
        with memory.loading():
            ready, engine = build(config, connection.wake)
    except Exception as error:
        log.exception("the engine could not start")
        connection.send(StartFailed(str(error) or type(error).__name__))
        connection.close()
        return 1
    connection.send(ready)
    log.info("the engine is ready", extra={"base": ready.spec.name, "load_seconds": round(ready.load_seconds, 3)})
    Service(engine, connection).run()
    return 0


def main(arguments: list[str] | None = None, build: Build = build) -> int:
    """The command; `build` makes the engine (a test gives its own)."""
    parser = argparse.ArgumentParser(prog="python -m server.engine.process", description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="the inherited descriptor of the front's socket")
    descriptor = parser.parse_args(arguments).socket
    logs.install("info")
    # libgomp's threads spin long before they sleep. Beside any other busy process that makes each of a step's hundreds
    # of parallel regions wait for a thread that is not scheduled; it is read when torch is loaded, which comes later.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    # Weights and KV in pages of 2 MiB, where Linux has them on request: a step of one row is 10% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A loader that got the interpreter between two kernels gives it back so soon; by default it keeps it for 5 ms.
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the front decides when we end
    return serve(descriptor, build)


if __name__ == "__main__":
    sys.exit(main())
