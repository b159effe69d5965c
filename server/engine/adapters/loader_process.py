"""Processes that load adapters beside the engine's own, so that no load holds the GIL while a step needs it.

A loader thread that computes in Python holds the GIL; if it loses its core meanwhile, at its low priority, the steps
wait for it. So loads are computed in processes that `server.engine.nursery` forks, which share what the
engine has in memory when it begins. A thread of the engine only waits for the reply: a head, the packed adapter's
buffer, and a frame that says what lies where in it. A process that ends or hangs in a load fails that load alone, and
another one takes its place; only if none can be started does the thread load by itself.
"""

from __future__ import annotations

import gc
import logging
import socket
import struct
from queue import Empty, SimpleQueue

import msgspec
import numpy as np
import torch

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import PrefixEmbeds, PrefixKV
from server.engine import frames
from server.engine.adapters.artifact_loader import ArtifactLoader, LoaderSetup
from server.engine.adapters.failures import LoadError, failure_reason
from server.engine.adapters.loader_threads import give_way
from server.engine.nursery import Child, Nursery, busy_seconds, set_tick
from server.model.precision import StorageDtypes
from server.model.slots.layout import PackedPatch

log = logging.getLogger(__name__)

TICK_S = 1.0  # between two looks at a process that loads
IDLE_S = 30.0  # of a load that neither computes nor waits for a core; a bucket's calls have deadlines of their own
SILENT_S = 300.0  # of any load
IDLE_SHARE = 0.01  # of one core: a load that goes on uses more
HEAD = struct.Struct("<QQ")  # bytes of the buffer, of the frame behind it
PREFIXES = {kind.__name__: kind for kind in (PrefixEmbeds, PrefixKV)}


class LoadRequest(msgspec.Struct):
    """The digest to load, and its folder in the staging area if it is not in the store yet."""

    digest: str
    folder: str | None = None


class LoadReply(msgspec.Struct):
    """A `PackedPatch` without its buffer; or, with a `code`, the reason why the load failed."""

    digest: str
    entries: bytes = b""
    row_ids: dict[int, bytes] = {}
    prefix: tuple[str, int, int] | None = None
    code: str | None = None
    reason: str = ""


class LoaderProcess:
    """The engine's side of a process that loads adapters; one caller uses it at a time."""

    def __init__(self, child: Child, setup: LoaderSetup) -> None:
        self._child, self._socket = child, child.socket
        set_tick(self._socket, TICK_S)
        self._socket.sendall(frames.encode(setup))

    def begin(self, request: bytes) -> None:
        """Send the frame of a load to the process. Raises `OSError` if the process has ended."""
        self._socket.sendall(request)

    def finish(self, dtypes: StorageDtypes) -> PackedPatch:
        """Receive the adapter. Raises `LoadError` if the load fails, `OSError` if the process ends or hangs."""
        num_buffer, num_frame = HEAD.unpack(self._receive(HEAD.size).numpy().tobytes())
        body = self._receive(num_buffer + num_frame)
        reply = msgspec.msgpack.decode(body.numpy().data[num_buffer:], type=LoadReply)
        if reply.code is not None:
            raise LoadError(reply.code, reply.reason)
        return _packed(reply, body[:num_buffer], dtypes)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._child.kill()
        self._socket.close()

    def _receive(self, size: int) -> torch.Tensor:
        """Receive `size` bytes [size] in one call: after each call a thread waits for the GIL, up to a whole step."""
        into = torch.empty(size, dtype=torch.uint8)
        left, patience = into.numpy().data, _Patience(self._child.pid)
        while left:
            try:
                num_bytes = self._socket.recv_into(left, len(left), socket.MSG_WAITALL)
            except BlockingIOError:  # nothing came within a tick
                patience.tick()
                continue
            if not num_bytes:
                raise ConnectionResetError("it closed its socket")
            left = left[num_bytes:]
        return into


class _Patience:
    """Tells a load that hangs from one that is long, in ticks and not by the clock: this process may be stopped too."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seconds: float | None = None  # read once a load is late: most never are, and reading holds up the steps
        self._silent_s = self._idle_s = 0.0

    def tick(self) -> None:
        """Look at the process again. Raises `TimeoutError` if it counts as one that hangs."""
        before, self._seconds = self._seconds, busy_seconds(self._pid)
        self._silent_s += TICK_S
        is_idle = before is not None and self._seconds <= before + IDLE_SHARE * TICK_S
        self._idle_s = self._idle_s + TICK_S if is_idle else 0.0
        if self._idle_s >= IDLE_S:
            raise TimeoutError(f"it did nothing for {IDLE_S:g} s")
        if self._silent_s >= SILENT_S:
            raise TimeoutError(f"it took over {SILENT_S:g} s")


class LoaderPool:
    """Loads adapters in the first of `num_processes` that is free, or in the calling thread if there is none."""

    def __init__(self, num_processes: int, nursery: Nursery | None) -> None:
        self._num_processes, self._nursery = num_processes, nursery
        self._processes: set[LoaderProcess] = set()
        self._free: SimpleQueue[LoaderProcess] = SimpleQueue()

    def begin(self, store: str | None, blobs: str, spec: BaseSpec, dtypes: StorageDtypes) -> None:
        """Start the processes for a store and a base. Raises `StoreError` if the store cannot be opened."""
        self._setup = LoaderSetup(store, blobs, spec, str(dtypes.matrices), str(dtypes.others))
        self._loader, self._dtypes = ArtifactLoader(self._setup), dtypes
        for _ in range(self._num_processes):
            self._start()

    def load(self, digest: str, folder: str | None) -> PackedPatch:
        """Load an artifact from `folder`, or from the store if that is None.

        To be called from at most as many threads at once as there are processes. Raises `LoadError` if the load fails
        in a process or ends it, and what `ArtifactLoader.load` raises if it fails here.
        """
        process = self._begin(digest, folder)
        if process is None:
            give_way()
            return self._loader.load(digest, folder)
        try:
            packed = process.finish(self._dtypes)
        except LoadError:
            self._free.put(process)
            raise
        except OSError as error:
            self._replace(process, error)
            raise LoadError("adapter_failed", "the process that loaded it ended or hung") from None
        except Exception as error:  # what it sent cannot be read: nothing that it sends later can be
            log.exception("a process that loads adapters sent what cannot be read", extra={"digest": digest})
            self._replace(process, error)
            raise LoadError("adapter_failed", "what the process that loaded it sent cannot be read") from None
        self._free.put(process)
        return packed

    def close(self) -> None:
        """Make all processes end."""
        for process in self._processes:
            process.kill()
        if self._nursery is not None:
            self._nursery.close()

    def _begin(self, digest: str, folder: str | None) -> LoaderProcess | None:
        """Give the load to a free process, and return it; one that ended while it was free is replaced."""
        request = frames.encode(LoadRequest(digest, folder))
        while True:
            try:
                process = self._free.get_nowait()
            except Empty:
                return None
            try:
                process.begin(request)
            except OSError as error:
                self._replace(process, error)
            else:
                return process

    def _replace(self, process: LoaderProcess, error: Exception) -> None:
        log.warning("a process that loads adapters has ended or hangs", extra={"reason": str(error)})
        self._processes.discard(process)
        process.kill()
        self._start()

    def _start(self) -> None:
        if self._nursery is None:
            return
        try:
            process = LoaderProcess(self._nursery.spawn(), self._setup)
        except OSError as error:
            log.warning("no process that loads adapters can be started; threads load", extra={"reason": str(error)})
            return
        self._processes.add(process)
        self._free.put(process)


def run_loader(connection: socket.socket) -> None:
    """Serve load requests in a process of its own until the engine closes its socket."""
    gc.enable()
    torch.set_num_threads(1)
    give_way()
    setup = frames.read(connection, msgspec.msgpack.Decoder(LoaderSetup))
    loader, decoder = setup and ArtifactLoader(setup), msgspec.msgpack.Decoder(LoadRequest)
    while loader and (request := frames.read(connection, decoder)) is not None:
        _reply(connection, loader, request)


def _reply(connection: socket.socket, loader: ArtifactLoader, request: LoadRequest) -> None:
    buffer = np.empty(0, np.uint8)
    try:
        packed = loader.load(request.digest, request.folder)
    except Exception as error:  # noqa: BLE001 - nothing that an artifact contains may end the process
        reply = LoadReply(
            request.digest, code=getattr(error, "code", "adapter_failed"), reason=failure_reason(request.digest, error)
        )
    else:
        buffer = packed.buffer.numpy()
        reply = _reply_of(packed)
    frame = msgspec.msgpack.encode(reply)
    for part in (HEAD.pack(len(buffer), len(frame)), buffer.data, frame):
        connection.sendall(part)


def _reply_of(packed: PackedPatch) -> LoadReply:
    prefix = packed.prefix and (packed.prefix[0].__name__, *packed.prefix[1:])
    row_ids = {site: ids.numpy().tobytes() for site, ids in packed.row_ids.items()}
    return LoadReply(packed.digest, packed.entries.tobytes(), row_ids, prefix)


def _packed(reply: LoadReply, buffer: torch.Tensor, dtypes: StorageDtypes) -> PackedPatch:
    entries = np.frombuffer(bytearray(reply.entries), np.int64).reshape(-1, 5)
    row_ids = {site: torch.frombuffer(bytearray(ids), dtype=torch.int32) for site, ids in reply.row_ids.items()}
    prefix = reply.prefix and (PREFIXES[reply.prefix[0]], *reply.prefix[1:])
    return PackedPatch(reply.digest, buffer, dtypes, entries, row_ids, prefix)
