"""The engine's own process: `python -m server.engine.worker --socket DESCRIPTOR`.

The process inherits one end of the API process's socket pair, reads an `EngineConfig`, loads the base, and forks an
engine for each socket that it is then sent: an engine that dies is followed by one that has nothing to load. On a GPU,
whose memory no fork can share, it becomes the engine itself. An engine sends `Ready` or `StartFailed` and steps until
its socket closes, so that none outlives its API process; SIGTERM does not end it. One thread reads frames, another
writes those that the socket does not take at once, and the engine has the main thread. No setting is read from the
environment.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from socket import socket as Socket  # noqa: N812 - a class
from socket import socketpair
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from server import logs, process_memory
from server.engine import frames
from server.engine.connection import Connection, Signal
from server.engine.engine import Engine
from server.engine.messages import (
    Abort,
    AskResidency,
    Beat,
    Discard,
    EngineConfig,
    KeepResident,
    Ready,
    Renew,
    Residency,
    Stage,
    StartFailed,
    StepDone,
    Submit,
    ToEngine,
)
from server.engine.nursery import CAN_FORK, PID, Nursery, receive, serve
from server.engine.thread_clock import thread_clock

if TYPE_CHECKING:  # it brings torch
    from server.model.runner import Loaded

log = logging.getLogger(__name__)

STATS_EVERY_S = 1.0
BEAT_EVERY_S = 1.0
WAIT_FOR_ADAPTERS_S = 0.05  # how often deadlines are checked while every sequence waits for an adapter
SPIN_COUNT = "20000"
SWITCH_S = 5e-4
OnLoaded = Callable[[], None]
Load = Callable[[EngineConfig], Any]
Build = Callable[[EngineConfig, Any, OnLoaded], tuple[Ready, Engine[Any]]]


def _tune_process() -> None:
    """Set what libraries read once, when they are loaded: call it before torch is imported."""
    # libgomp's threads spin long before they sleep. Beside any other busy process that makes each of a step's hundreds
    # of parallel regions wait for a thread that is not scheduled.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    # Weights and KV in pages of 2 MiB, where Linux has them on request: a step of one row is 10% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A loader that got the interpreter between two kernels gives it back so soon; by default it keeps it for 5 ms.
    sys.setswitchinterval(SWITCH_S)


def _hide_accelerate() -> None:
    """Make `import accelerate` fail in this process: call it before transformers is imported.

    transformers imports accelerate if it is installed, which takes 0.2 s of every start. It only serves to spread a
    base over several devices; an engine's base is on one.
    """
    sys.modules.setdefault("accelerate", None)  # type: ignore[arg-type]


def load(config: EngineConfig) -> Loaded:
    """Load the base; the heavy imports are here and in `build`, so that fakes need none.

    Raises `UnsupportedBaseError` and what reading the base's files raises.
    """
    _hide_accelerate()
    from server.engine.adapters import loader_process  # noqa: F401 - what is imported now is shared by all forks
    from server.model import runner

    process_memory.keep_imports()
    return runner.load(config.runner)


def build(config: EngineConfig, loaded: Loaded, on_loaded: OnLoaded) -> tuple[Ready, Engine[Any]]:
    """Make the engine that serves a loaded base; `on_loaded` is called from a loading thread after each load.

    Raises `StoreError` if the store cannot be opened, and `RuntimeError` if this process computes otherwise than the
    one that loaded the base.
    """
    from server.engine.adapters.loader_process import LoaderPool, run_loader
    from server.engine.adapters.loader_threads import LoaderThreads
    from server.engine.forms import FormCompiler
    from server.model.slots.layout import PackedPatch

    loader_pool = LoaderPool(config.num_loaders, Nursery.fork(run_loader))
    loaded.runner.enter_process()
    loader_pool.begin(config.store, config.blobs, loaded.spec, loaded.adapter_slots.dtypes)
    staged = dict[str, str]()

    def load_adapter(digest: str) -> PackedPatch:
        return loaded.adapter_slots.pin(loader_pool.load(digest, staged.get(digest)))

    tokenizer = loaded.form_tokenizer
    engine = Engine(
        loaded.runner,
        loaded.adapter_slots,
        load_adapter,
        replace(config, runner=replace(config.runner, max_sequence_tokens=loaded.max_sequence_tokens)),
        eos_token_ids=loaded.eos_token_ids,
        spawner=LoaderThreads(config.num_loaders),
        clock=time.monotonic,
        on_loaded=on_loaded,
        staged=staged,
        thread_clock=thread_clock(),
        forms=None if tokenizer is None else FormCompiler(tokenizer, LoaderThreads(1), on_loaded),
    )
    return _describe(loaded, config, engine.max_sequence_tokens), engine


def _describe(loaded: Loaded, config: EngineConfig, max_sequence_tokens: int) -> Ready:
    """Describe a loaded base to the API process, which refuses by it what cannot be served."""
    import torch

    dtypes = loaded.adapter_slots.dtypes
    return Ready(
        spec=loaded.spec,
        eos_token_ids=loaded.eos_token_ids,
        max_sequence_tokens=max_sequence_tokens,
        max_adapter_bytes=min(config.slot_bytes, config.host_bytes),
        item_bytes=dtypes.item_bytes,
        precision=loaded.precision,
        load_seconds=loaded.load_seconds,
        has_forms=loaded.form_tokenizer is not None,
        largest_value=torch.finfo(dtypes.matrices).max,
        forward=loaded.forward,
    )


class Service:
    """Hands the connection's messages to the engine and the engine's outputs to the connection."""

    def __init__(self, engine: Engine[Any], connection: Connection) -> None:
        self.engine, self.connection = engine, connection
        self._stats_due = 0.0

    def run(self) -> None:
        """Step until the connection closes."""
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
        """Take every message that has arrived; wait up to `timeout` seconds for the first, or not at all for 0."""
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
        """Check the engine's bookkeeping once a second, and return its stats; None in between."""
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
            case Discard():
                self.engine.discard(message.digest)
            case Stage():
                self.engine.stage(message.digest, message.folder)
            case KeepResident():
                self.engine.keep_resident(message.digests)
            case Renew():
                self.engine.renew(message.digest)
            case AskResidency():
                self.connection.send(Residency(message.query_id, self.engine.adapters.states()))
            case Signal():
                pass


def _beat(connection: Connection) -> None:
    while True:
        connection.send(Beat())
        time.sleep(BEAT_EVERY_S)


def run_engine(socket: Socket, config: EngineConfig, loaded: Any, build: Build) -> None:
    """Serve a loaded base over a socket until it closes; what `loaded` is if loading failed, or raises, is told."""
    connection = Connection(socket)
    try:
        if isinstance(loaded, Exception):
            raise loaded
        ready, engine = build(config, loaded, connection.wake)
    except Exception as error:
        log.exception("the engine could not start")
        connection.send(StartFailed(str(error) or type(error).__name__))
        connection.close()
        return
    connection.send(ready)
    connection.start_reading()
    if ready.forward is not None:
        log.info("the base runs as: %s", ready.forward.describe())
    log.info("the engine is ready", extra={"base": ready.spec.name, "load_seconds": round(ready.load_seconds, 3)})
    threading.Thread(target=_beat, args=(connection,), name="beats", daemon=True).start()
    Service(engine, connection).run()


def serve_engines(control: Socket, load: Load, build: Build) -> int:
    """Load the base that the API process names, then fork an engine for each socket that it sends, or become one.

    Returns the exit code once the API process has gone, or once it was told that loading failed.
    """
    config: EngineConfig | None = frames.read(control, msgspec.msgpack.Decoder(EngineConfig))
    if config is None:
        return 0
    logs.install(config.log_level, config.log_format)
    with process_memory.loading():
        loaded = _load_in_thread(partial(load, config), control)

    def run(socket: Socket) -> None:
        run_engine(socket, config, loaded, build)

    is_failure = isinstance(loaded, Exception)
    if CAN_FORK and config.runner.device == "cpu" and not is_failure:
        serve(control, run)
    descriptor = receive(control)
    if descriptor is not None:
        control.sendall(PID.pack(os.getpid()))
        run(Socket(fileno=descriptor))
        receive(control)  # until the API process has read why
    return int(is_failure)


def _load_in_thread(load: Callable[[], Any], control: Socket) -> Any:
    """Load in a thread that has ended on return; returns what was loaded, or the exception.

    OpenMP's threads end with the thread whose loops they share, so that none is left that a fork would lack. The
    process ends if the API process goes meanwhile.
    """
    results: list[Any] = []
    mine, its = socketpair()

    def run() -> None:
        with its:
            try:
                results.append(load())
            except Exception as error:  # noqa: BLE001 - it is told to the API process
                results.append(error)

    loader = threading.Thread(target=run, name="loader", daemon=True)
    loader.start()
    with mine:
        ends = select.poll()
        for end in (mine, control):
            ends.register(end, 0)  # 0: only what is always told, such as POLLHUP
        if control.fileno() in dict(ends.poll()):
            os._exit(1)
    loader.join()
    while Path(f"/proc/self/task/{loader.native_id}").exists():  # `join` does not wait for what ends with the thread
        time.sleep(0.001)
    return results.pop()


def main(arguments: list[str] | None = None, load: Load = load, build: Build = build) -> int:
    """Run the command; `load` and `build` make the engine (tests pass their own). Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.engine.worker", description=__doc__)
    parser.add_argument(
        "--socket", type=int, required=True, help="the inherited descriptor of the API process's socket"
    )
    descriptor = parser.parse_args(arguments).socket
    logs.install("info")  # until the configuration has come
    _tune_process()
    for heard_by_all in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, a supervisor's stop: the API process drains first
        signal.signal(heard_by_all, signal.SIG_IGN)
    return serve_engines(Socket(fileno=descriptor), load, build)


if __name__ == "__main__":
    sys.exit(main())
