"""Processes that load adapters beside the engine's own, so that no load holds the GIL while a step needs it.

A loader thread that computes in Python holds the GIL; if it loses its core meanwhile, at its low priority, the steps
wait for it. So loads are computed in processes that are forked from the engine before it loads its base, which share
what is imported by then. A thread of the engine only waits for the reply: a head, the packed adapter's buffer, and a
frame that says what lies where in it. If there is no such process, or it has ended, the thread loads by itself.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
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
from server.model.precision import StorageDtypes
from server.model.slots.layout import PackedPatch

log = logging.getLogger(__name__)

STANDARD = 2  # descriptors up to this are the standard streams
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

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._socket = pid, connection

    @classmethod
    def fork(cls) -> LoaderProcess | None:
        """Start a process that waits for its setup; None if the system has no fork.

        To be called before torch has started threads: they would be missing in the new process.
        """
        if not hasattr(os, "fork"):
            return None
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            _run_loader(theirs)
        theirs.close()
        return cls(pid, ours)

    def begin(self, setup: LoaderSetup) -> None:
        """Send the process its setup. Raises `OSError` if the process has ended."""
        self._socket.sendall(frames.encode(setup))

    def load(self, digest: str, folder: str | None, dtypes: StorageDtypes) -> PackedPatch:
        """Load an adapter in the process. Raises `LoadError` if the load fails, `OSError` if the process has ended."""
        self._socket.sendall(frames.encode(LoadRequest(digest, folder)))
        num_buffer, num_frame = HEAD.unpack(self._receive(HEAD.size).numpy().tobytes())
        body = self._receive(num_buffer + num_frame)
        reply = msgspec.msgpack.decode(body.numpy().data[num_buffer:], type=LoadReply)
        if reply.code is not None:
            raise LoadError(reply.code, reply.reason)
        return _packed(reply, body[:num_buffer], dtypes)

    def close(self) -> None:
        """Make the process end, and wait until it has."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _receive(self, size: int) -> torch.Tensor:
        """Receive `size` bytes [size] in one call: after each call a thread waits for the GIL, up to a whole step."""
        into = torch.empty(size, dtype=torch.uint8)
        left = into.numpy().data
        while left:
            num_bytes = self._socket.recv_into(left, len(left), socket.MSG_WAITALL)
            if not num_bytes:
                raise ConnectionResetError("it closed its socket")
            left = left[num_bytes:]
        return into


class LoaderPool:
    """Loads adapters in the first process that is free, or in the calling thread if no process is left."""

    def __init__(self, num_processes: int, fork: Callable[[], LoaderProcess | None] = LoaderProcess.fork) -> None:
        self._processes = [process for _ in range(num_processes) if (process := fork()) is not None]
        self._free: SimpleQueue[LoaderProcess] = SimpleQueue()

    def begin(self, store: str | None, blobs: str, spec: BaseSpec, dtypes: StorageDtypes) -> None:
        """Set the processes up for a store and a base. Raises `StoreError` if the store cannot be opened."""
        setup = LoaderSetup(store, blobs, spec, str(dtypes.matrices), str(dtypes.others))
        self._loader, self._dtypes = ArtifactLoader(setup), dtypes
        for process in self._processes:
            try:
                process.begin(setup)
            except OSError as error:
                _retire(process, error)
            else:
                self._free.put(process)

    def load(self, digest: str, folder: str | None) -> PackedPatch:
        """Load an artifact from `folder`, or from the store if that is None.

        To be called from at most as many threads at once as there are processes. Raises `LoadError` if the load fails
        in a process, and what `ArtifactLoader.load` raises if it fails here.
        """
        try:
            process = self._free.get_nowait()
        except Empty:
            give_way()
            return self._loader.load(digest, folder)
        try:
            packed = process.load(digest, folder, self._dtypes)
        except LoadError:
            self._free.put(process)
            raise
        except OSError as error:
            _retire(process, error)
            return self.load(digest, folder)
        self._free.put(process)
        return packed

    def close(self) -> None:
        """Make all processes end."""
        for process in self._processes:
            process.close()


def _retire(process: LoaderProcess, error: OSError) -> None:
    log.warning("a process that loads adapters has ended; threads load", extra={"reason": str(error)})
    process.close()


def _run_loader(connection: socket.socket) -> None:
    """Serve load requests in the new process until the engine closes its socket; never returns."""
    try:
        _keep_only(connection.fileno())
        gc.enable()
        torch.set_num_threads(1)
        give_way()
        setup = frames.read(connection, msgspec.msgpack.Decoder(LoaderSetup))
        loader, decoder = setup and ArtifactLoader(setup), msgspec.msgpack.Decoder(LoadRequest)
        while loader and (request := frames.read(connection, decoder)) is not None:
            _reply(connection, loader, request)
    except BaseException as error:  # noqa: BLE001 - nothing of the engine's stack above may run here
        log.error("a process that loads adapters ends", extra={"reason": str(error)})
    finally:
        os._exit(0)


def _keep_only(descriptor: int) -> None:
    """Close the inherited descriptors but the standard streams, or the API process would not see the engine end."""
    for inherited in sorted(int(path.name) for path in Path("/dev/fd").iterdir()):
        if inherited > STANDARD and inherited != descriptor:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(inherited)


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
