"""Processes that load adapters beside the engine's own, so that no load holds Python's lock while a step wants it.

A thread that computes in Python holds its process's lock. Where such a loader has to leave its core meanwhile, and it
computes at low priority, the steps wait for it. So a load is computed in a process that was forked from the engine
before it loaded its base, and shares what is imported by then; a thread of the engine only waits for the answer: a
head, then the packed patch's buffer and a frame that says what lies where. Where there is no such process, or it has
ended, the thread loads by itself.
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
from adapters_store.errors import ArtifactCorruptError
from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import PrefixEmbeds, PrefixKV
from adapters_store.storage.bucket import open_blobs
from server.engine import frames
from server.engine.adapters.load_queue import LoadError, reason_of
from server.engine.adapters.loader_threads import give_way
from server.model.precision import StorageDtypes
from server.model.slots.layout import PackedPatch, Sites, pack

log = logging.getLogger(__name__)

STANDARD = 2  # descriptors up to this are the standard streams
HEAD = struct.Struct("<QQ")  # bytes of the buffer, of the frame behind it
DTYPE_OF_NAME = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
PREFIXES = {kind.__name__: kind for kind in (PrefixEmbeds, PrefixKV)}


class LoaderSetup(msgspec.Struct):
    """What a helper is told first: where artifacts are, and what they are compiled for."""

    store: str | None
    blobs: str
    spec: BaseSpec
    matrices: str
    others: str


class LoadRequest(msgspec.Struct):
    """Load this one, from a folder of the staging area where it is not in the store yet."""

    digest: str
    folder: str | None = None


class LoadReply(msgspec.Struct):
    """`PackedPatch` without its buffer; or, with a `code`, why there is none."""

    digest: str
    entries: bytes = b""
    row_ids: dict[int, bytes] = {}
    prefix: tuple[str, int, int] | None = None
    code: str | None = None
    reason: str = ""


class ArtifactLoader:
    """Reads, compiles and packs; any process, any thread."""

    def __init__(self, setup: LoaderSetup) -> None:
        self._blobs = open_blobs(setup.store, Path(setup.blobs))
        self._spec, self._sites = setup.spec, Sites(setup.spec)
        self._kept = StorageDtypes(DTYPE_OF_NAME[setup.matrices], DTYPE_OF_NAME[setup.others])

    def load(self, digest: str, folder: str | None) -> PackedPatch:
        """The packed patch of an artifact. Raises what the store and `compile_patch` raise."""
        artifact = self._blobs.read(digest) if folder is None else read_folder(Path(folder))
        if artifact.digest != digest:
            raise ArtifactCorruptError(f"the staged artifact {digest[:12]} is not what was checked")
        return pack(compile_patch(artifact, self._spec), self._sites, self._kept)


class LoaderProcess:
    """One process, for one caller at a time."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._socket = pid, connection

    @classmethod
    def fork(cls) -> LoaderProcess | None:
        """A new process that waits for its job; None where the system has no fork. Before torch has threads."""
        if not hasattr(os, "fork"):
            return None
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            _run_loader(theirs)
        theirs.close()
        return cls(pid, ours)

    def begin(self, setup: LoaderSetup) -> None:
        """Tell it its job. Raises `OSError` where it has ended."""
        self._socket.sendall(frames.encode(setup))

    def load(self, digest: str, folder: str | None, dtypes: StorageDtypes) -> PackedPatch:
        """The packed patch. Raises `LoadError` where there is none, and `OSError` where the process has ended."""
        self._socket.sendall(frames.encode(LoadRequest(digest, folder)))
        num_buffer, num_frame = HEAD.unpack(self._receive(HEAD.size).numpy().tobytes())
        body = self._receive(num_buffer + num_frame)
        reply = msgspec.msgpack.decode(body.numpy().data[num_buffer:], type=LoadReply)
        if reply.code is not None:
            raise LoadError(reply.code, reply.reason)
        return _packed(reply, body[:num_buffer], dtypes)

    def close(self) -> None:
        """Let it end, and wait for that."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _receive(self, size: int) -> torch.Tensor:
        """So many bytes, by one call: after each a thread waits for Python's lock, which may take a step."""
        into = torch.empty(size, dtype=torch.uint8)
        left = into.numpy().data
        while left:
            num_bytes = self._socket.recv_into(left, len(left), socket.MSG_WAITALL)
            if not num_bytes:
                raise ConnectionResetError("it closed its socket")
            left = left[num_bytes:]
        return into


class LoaderPool:
    """The loads of an engine: each by a helper that is free, or in the calling thread where there is none any more."""

    def __init__(self, num_processes: int, fork: Callable[[], LoaderProcess | None] = LoaderProcess.fork) -> None:
        self._processes = [process for _ in range(num_processes) if (process := fork()) is not None]
        self._free: SimpleQueue[LoaderProcess] = SimpleQueue()

    def begin(self, store: str | None, blobs: str, spec: BaseSpec, dtypes: StorageDtypes) -> None:
        """From now on they can load. Raises `StoreError` where the store cannot be opened."""
        setup = LoaderSetup(store, blobs, spec, str(dtypes.matrices), str(dtypes.others))
        self._loader, self._kept = ArtifactLoader(setup), dtypes
        for process in self._processes:
            try:
                process.begin(setup)
            except OSError as error:
                _retire(process, error)
            else:
                self._free.put(process)

    def load(self, digest: str, folder: str | None) -> PackedPatch:
        """The packed patch of an artifact; at most as many threads as there are helpers call it at once."""
        try:
            process = self._free.get_nowait()
        except Empty:
            give_way()
            return self._loader.load(digest, folder)
        try:
            packed = process.load(digest, folder, self._kept)
        except LoadError:
            self._free.put(process)
            raise
        except OSError as error:
            _retire(process, error)
            return self.load(digest, folder)
        self._free.put(process)
        return packed

    def close(self) -> None:
        """Let all end."""
        for process in self._processes:
            process.close()


def _retire(process: LoaderProcess, error: OSError) -> None:
    log.warning("a process that loads adapters has ended; threads load", extra={"reason": str(error)})
    process.close()


def _run_loader(connection: socket.socket) -> None:
    """In the new process: answer until the engine has gone."""
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
    """Close what was inherited, but for the standard streams: the front must see it when the engine has gone."""
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
            request.digest, code=getattr(error, "code", "adapter_failed"), reason=reason_of(request.digest, error)
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
