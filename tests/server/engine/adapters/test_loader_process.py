"""The processes that load adapters: what they send is what a load here gives, and nothing depends on them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import msgspec
import psutil
import pytest
import torch

from adapters_store.format.folder import read_folder
from adapters_store.storage.directory import Blobs
from server.engine import nursery as nursery_room
from server.engine.adapters import loader_process
from server.engine.adapters.artifact_loader import ArtifactLoader, LoaderSetup
from server.engine.adapters.failures import LoadError, failure_message
from server.engine.adapters.loader_process import HEAD, LoaderPool, LoaderProcess, LoadReply, run_loader
from server.engine.adapters.loader_threads import NICENESS
from server.engine.nursery import Nursery, busy_seconds
from server.model.load import load_base
from server.model.precision import StorageDtypes
from server.model.slots.layout import PackedPatch
from tests.kit.families import FAMILIES
from tests.kit.stored import store

KEPT = StorageDtypes(torch.float16, torch.float32)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    """A store of artifacts."""
    return Blobs(tmp_path_factory.mktemp("store") / "blobs")


@pytest.fixture(scope="module")
def job(biased_base: Path, blobs: Blobs) -> LoaderSetup:
    """Set loaders up for the small base with biases, with matrices in 16 bits."""
    spec = load_base(biased_base, "tiny", "fp32", "cpu").spec
    return LoaderSetup(None, str(blobs.root), spec, str(KEPT.matrices), str(KEPT.others))


@pytest.fixture
def processes(job: LoaderSetup) -> Iterator[LoaderPool]:
    """Two, ready to load."""
    made = LoaderPool(2, Nursery.fork(run_loader))
    made.begin(job.store, job.blobs, job.spec, KEPT)
    yield made
    made.close()


def assert_same(found: PackedPatch, wanted: PackedPatch) -> None:
    """Every byte and every number."""
    assert torch.equal(found.buffer, wanted.buffer)
    assert found.entries.tolist() == wanted.entries.tolist()
    assert {site: ids.tolist() for site, ids in found.row_ids.items()} == {
        site: ids.tolist() for site, ids in wanted.row_ids.items()
    }
    assert {ids.dtype for ids in found.row_ids.values()} <= {torch.int32}
    assert (found.digest, found.dtypes, found.prefix) == (wanted.digest, wanted.dtypes, wanted.prefix)
    assert found.num_bytes == wanted.num_bytes


def children(nursery: Nursery | None) -> list[psutil.Process]:
    """Return the loader processes that a nursery has forked and that are there."""
    assert nursery is not None
    return list(psutil.Process(nursery.pid).children())


def own_priority() -> int:
    """Return the priority of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize("method", FAMILIES)
def test_a_process_loads_what_a_load_here_gives(
    method: str, processes: LoaderPool, job: LoaderSetup, blobs: Blobs, biased_base: Path, tmp_path: Path
) -> None:
    """A process loads the same buffer, table, rows and prefix as a load here, for every method."""
    digest = store(blobs, FAMILIES[method](tmp_path / method, biased_base, 1))
    assert_same(processes.load(digest, None), ArtifactLoader(job).load(digest, None))


def test_what_is_staged_is_read_from_its_folder(
    processes: LoaderPool, blobs: Blobs, biased_base: Path, tmp_path: Path
) -> None:
    """An artifact that is not in the store yet is loaded from a folder, if it is the one that was checked."""
    folder = FAMILIES["lora"](tmp_path / "staged", biased_base, 9)
    digest = read_folder(folder).digest
    assert processes.load(digest, str(folder)).digest == digest
    with pytest.raises(LoadError, match="is not what was checked") as raised:
        processes.load("0" * 64, str(folder))
    assert raised.value.code == "artifact_corrupt"
    assert digest not in blobs.digests()


def test_why_a_load_failed_arrives(processes: LoaderPool, blobs: Blobs, biased_base: Path, tmp_path: Path) -> None:
    """The sentence and the code are those of a load in this process, and the process goes on."""
    digest = store(blobs, FAMILIES["lora"](tmp_path / "a", biased_base, 2))
    with (blobs.path(digest) / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    for wanted, code, reason in ((digest, "artifact_corrupt", "corrupt"), ("f" * 64, "not_found", "no artifact")):
        with pytest.raises(LoadError) as raised:
            processes.load(wanted, None)
        assert raised.value.code == code
        assert reason in failure_message(wanted, raised.value)
    whole = store(blobs, FAMILIES["lora"](tmp_path / "b", biased_base, 3))
    assert processes.load(whole, None).digest == whole
    assert len(children(processes._nursery)) == 2


@pytest.fixture
def lora(blobs: Blobs, biased_base: Path, tmp_path: Path) -> str:
    """The digest of an artifact that is in the store."""
    return store(blobs, FAMILIES["lora"](tmp_path / "lora", biased_base, 4))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_ends_while_it_is_free_is_replaced(
    processes: LoaderPool, job: LoaderSetup, lora: str, how: signal.Signals
) -> None:
    """Whatever ended the processes, the next loads come from new ones."""
    wanted, before = ArtifactLoader(job).load(lora, None), children(processes._nursery)
    for child in before:
        child.send_signal(how)
    psutil.wait_procs(before, 10)
    for _ in range(3):
        assert_same(processes.load(lora, None), wanted)
    after = children(processes._nursery)
    assert len(after) == 2 and not {child.pid for child in after} & {child.pid for child in before}


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_load_that_takes_its_process_along_fails_alone(
    job: LoaderSetup, lora: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load in which a process ends or hangs fails, and is not given to the next process; other loads go on."""
    if how == "hangs":
        monkeypatch.setattr(loader_process, "TICK_S", 0.1)
        monkeypatch.setattr(loader_process, "IDLE_S", 1.0)
    nursery = Nursery.fork(run_loader)
    assert nursery is not None
    made = LoaderPool(2, nursery)
    made.begin(job.store, job.blobs, job.spec, KEPT)
    before = children(nursery)
    before[0].suspend()  # the first that was started is the first that is free
    with ThreadPoolExecutor(1) as threads:
        stuck = threads.submit(made.load, "0" * 64, None)
        wait_until(lambda: made._free.qsize() == 1)
        assert made.load(lora, None).digest == lora
        if how == "ends":
            before[0].kill()
        with pytest.raises(LoadError, match="ended or hung") as raised:
            stuck.result()
    assert raised.value.code == "adapter_failed"
    for _ in range(3):
        assert made.load(lora, None).digest == lora
    assert len(children(nursery)) == 2 and len({*children(nursery)} & {*before}) == 1
    made.close()
    assert not psutil.pid_exists(nursery.pid)


def test_a_load_that_computes_or_waits_for_a_core_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load is idle only while it neither uses nor lacks a core; one that computes has the time of any load."""
    seconds = iter([0.0, 1.0, 2.0, 2.0, 3.0, *[4.0] * 40])
    monkeypatch.setattr(loader_process, "busy_seconds", lambda _pid: next(seconds))
    patience = loader_process._Patience(1)
    assert next(seconds) == 0.0, "a load that is not late is not looked at"
    seconds = chain([0.0], seconds)
    for _ in range(5 + 30):
        patience.tick()
    with pytest.raises(TimeoutError, match="did nothing for 30 s"):
        patience.tick()
    busy = iter(range(1000))
    monkeypatch.setattr(loader_process, "busy_seconds", lambda _pid: float(next(busy)))
    patience = loader_process._Patience(1)
    for _ in range(299):
        patience.tick()
    with pytest.raises(TimeoutError, match="over 300 s"):
        patience.tick()


def test_a_process_that_computes_is_seen() -> None:
    """The time that a process has or lacks a core is read from the system."""
    before = busy_seconds(os.getpid())
    while busy_seconds(os.getpid()) == before:
        sum(range(1000))


FRAMES = {
    "bytes that no memory holds": HEAD.pack(2**62, 1),
    "no message": HEAD.pack(0, 1) + b"\xc1",
    "another message": HEAD.pack(0, 1) + b"\x01",
    "a table that is cut": (frame := msgspec.msgpack.encode(LoadReply("a", entries=b"12345")))
    and HEAD.pack(0, len(frame)) + frame,
    "a prefix of no kind": (frame := msgspec.msgpack.encode(LoadReply("a", prefix=("None", 0, 0))))
    and HEAD.pack(0, len(frame)) + frame,
}


@pytest.mark.parametrize("sent", FRAMES)
def test_a_process_that_sends_what_cannot_be_read_is_replaced(
    processes: LoaderPool, lora: str, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a process sends, its load fails alone, and there are as many processes as before, each of them sound."""
    monkeypatch.setattr(LoaderProcess, "begin", lambda _self, _request: None)
    first = processes._free.get()
    processes._free.put(first)
    second = processes._free.get()
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(FRAMES[sent])
        first._socket.close()
        first._socket = ours
        processes._free = SimpleQueue()
        processes._free.put(first)
        with pytest.raises(LoadError, match="cannot be read"):
            processes.load(lora, None)
    monkeypatch.undo()
    processes._free.put(second)
    assert processes._free.qsize() == len(processes._processes) == 2
    for _ in range(3):
        assert processes.load(lora, None).digest == lora


def test_without_its_nursery_the_thread_loads(processes: LoaderPool, job: LoaderSetup, lora: str) -> None:
    """If no process can be started in place of those that ended, the thread that asks loads, at low priority."""
    before, wanted = own_priority(), ArtifactLoader(job).load(lora, None)
    assert processes._nursery is not None
    gone = [*children(processes._nursery), psutil.Process(processes._nursery.pid)]
    processes._nursery.close()
    for child in gone:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(gone, 10)
    with ThreadPoolExecutor(1) as threads:
        assert_same(threads.submit(processes.load, lora, None).result(), wanted)
        assert threads.submit(own_priority).result() == max(before, NICENESS)
    assert own_priority() == before


def test_a_nursery_that_hangs_is_ended(
    processes: LoaderPool, job: LoaderSetup, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process that forks is stopped, the thread that needs a loader from it loads by itself, and goes on to."""
    monkeypatch.setattr(nursery_room, "FORK_IDLE_S", 0.5)
    wanted, nursery = ArtifactLoader(job).load(lora, None), processes._nursery
    assert nursery is not None
    before = children(nursery)
    for child in before:
        child.kill()
    psutil.wait_procs(before, 10)
    os.kill(nursery.pid, signal.SIGSTOP)
    for _ in range(2):
        assert_same(processes.load(lora, None), wanted)
    assert not psutil.pid_exists(nursery.pid)


def test_without_a_fork_the_thread_loads(job: LoaderSetup, blobs: Blobs, biased_base: Path, tmp_path: Path) -> None:
    """A system without fork has no loader processes, and loads all the same."""
    digest = store(blobs, FAMILIES["ia3"](tmp_path / "a", biased_base, 5))
    alone = LoaderPool(2, None)
    alone.begin(job.store, job.blobs, job.spec, KEPT)
    with ThreadPoolExecutor(1) as threads:
        assert_same(threads.submit(alone.load, digest, None).result(), ArtifactLoader(job).load(digest, None))


def test_a_process_gives_way_and_holds_nothing(processes: LoaderPool) -> None:
    """A process runs at low priority and has no descriptor of the engine's but its own socket."""
    lowest = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))
    for child in children(processes._nursery):
        wait_until(partial(lambda one: one.nice() == lowest and one.num_fds() == 4, child))


def test_a_process_ends_with_its_engine() -> None:
    """A process ends as soon as the other end of its socket is gone, whatever it does then."""
    nursery = Nursery.fork(lambda _connection: time.sleep(600))
    assert nursery is not None
    child = nursery.spawn()
    before = children(nursery)
    assert [process.pid for process in before] == [child.pid]
    child.socket.close()
    assert not psutil.wait_procs(before, 5)[1]
    child.kill()
    nursery.close()
    assert not psutil.pid_exists(nursery.pid)
    with pytest.raises(OSError):
        nursery.spawn()


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until it holds. Raises `TimeoutError`."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.01)
