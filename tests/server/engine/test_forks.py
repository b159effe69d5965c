"""Engines are forked from the process that loaded the base; that process is replaced if it may be at fault."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from server.core import RunnerConfig
from server.engine.engine_process import EngineParent
from server.engine.nursery import Nursery
from server.engine.process_client import MAX_MUTE, ProcessEngineClient
from server.engine.worker import _load_in_thread
from server.model.runner import load
from tests.server.engine.test_process_client import (
    COMMAND,
    FAST,
    alone,
    answer,
    engine,
    engines,
    kill,
    replace_patience,
    request,
    run,
    tokens,
    until,
)
from tests.server.engine.world import config


def parent_of(client: ProcessEngineClient) -> int:
    """The process that the engine was forked from."""
    assert client.pid is not None
    parent: int = psutil.Process(client.pid).ppid()
    return parent


async def next_engine(client: ProcessEngineClient) -> None:
    """Kill the engine, and wait for the next one."""
    await kill(client)
    await until(lambda: client.ready is not None)


def test_the_base_is_loaded_once() -> None:
    """Engines that answered before they died follow one another from the same process, however many they are."""

    async def main() -> None:
        async with engine() as client:
            parent = parent_of(client)
            for at in range(MAX_MUTE + 1):
                asked = request(f"r{at}", "digest")
                assert tokens(await answer(client, asked)) == alone(asked)
                await next_engine(client)
                assert parent_of(client) == parent

    run(main)


def test_engines_that_die_mute_make_the_base_load_again() -> None:
    """If engines in a row die without an answer, the next one comes from a new process; one that answered resets it."""

    async def main() -> None:
        async with engine() as client:
            first = parent_of(client)
            await next_engine(client)
            await answer(client, request("r"))
            for at in range(1 + MAX_MUTE):
                assert parent_of(client) == first, at
                await next_engine(client)
            assert parent_of(client) != first and not psutil.pid_exists(first)

    run(main)


def test_an_engine_outlives_the_process_that_loaded_the_base() -> None:
    """If the process that holds the base is killed, the engine goes on, and the next one loads the base again."""

    async def main() -> None:
        async with engine("slow") as client:
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            pid, parent = client.pid, parent_of(client)
            os.kill(parent, signal.SIGKILL)
            assert tokens(await running) == alone(asked)
            assert client.pid == pid
            await next_engine(client)
            assert client.num_starts == 2 and parent_of(client) != parent
        assert not engines()

    run(main)


@pytest.mark.parametrize("also_engine", [False, True])
def test_a_process_with_the_base_that_hangs_is_replaced(also_engine: bool) -> None:
    """If the process that holds the base is stopped, the next engine comes from a new one, long before a fork's limit.

    A request that ran meanwhile goes on, whether the engine died or was stopped too.
    """

    async def main() -> None:
        async with engine("slow", patience=replace_patience(silence=2.0)) as client:
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            assert client.pid is not None
            parent = parent_of(client)
            os.kill(parent, signal.SIGSTOP)
            os.kill(client.pid, signal.SIGSTOP if also_engine else signal.SIGKILL)
            assert tokens(await running) == alone(asked)
            assert parent_of(client) != parent and not psutil.pid_exists(parent)
        assert not engines()

    run(main)


def test_on_a_gpu_the_process_becomes_the_engine() -> None:
    """Memory of a GPU is shared by no fork: there the engine is the process that loaded, and each one loads."""

    async def main() -> None:
        on_gpu = config("slow")
        on_gpu = replace(on_gpu, runner=replace(on_gpu.runner, device="cuda"))
        client = ProcessEngineClient(on_gpu, command=COMMAND, patience=FAST)
        await client.start()
        try:
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            assert parent_of(client) == os.getpid()
            await kill(client)
            assert tokens(await running) == alone(asked)
            assert parent_of(client) == os.getpid() and client.num_starts == 2
        finally:
            await client.close()
        assert not engines()

    run(main)


def test_what_an_engine_died_of_is_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    """An engine that raises, or is killed, leaves its traceback or its signal in the log."""

    async def main() -> None:
        async with engine("raises") as client:
            asking = asyncio.create_task(answer(client, request("r")))
            await until(lambda: client.stats.deaths_total == 2)
            await asking
        async with engine() as client:
            await next_engine(client)

    run(main)
    said = capfd.readouterr().err
    assert "Traceback" in said and "KeyError" in said and "in run_engine" in said
    assert '"code": -9' in said


def test_the_wait_for_the_next_engine_is_that_of_its_kind() -> None:
    """`retry_after_s` is what a fork takes, or what loading takes if the base must be loaded again."""

    async def main() -> None:
        async with engine(patience=replace_patience(first_retry=0.5)) as client:
            client._load_s = 100.0
            await kill(client)
            assert client.retry_after_s < 10
            await until(lambda: client.ready is not None)
            os.kill(parent_of(client), signal.SIGKILL)
            await until(lambda: client._parent is not None and client._parent.has_ended)
            await kill(client)
            assert client.retry_after_s > 90

    run(main)


def test_a_process_is_killed_by_any_descriptor() -> None:
    """A child ends when it is told to, however many descriptors this process has open."""
    nursery = Nursery.fork(lambda _connection: time.sleep(600))
    assert nursery is not None
    child = nursery.spawn()
    low, child._handle = child._handle, 2000
    os.dup2(low, 2000)
    os.close(low)
    child.kill()
    child.socket.close()
    nursery.close()
    assert not psutil.pid_exists(child.pid)


def test_who_loads_for_nobody_ends() -> None:
    """A process whose API process goes while it loads the base ends at once, by itself."""

    async def main() -> None:
        parent = await EngineParent.start(COMMAND, config("loads"))
        await asyncio.sleep(0)
        await parent.end(within_s=30)
        assert parent._process.returncode in (0, 1)  # -9 is killed

    run(main)


@pytest.mark.parametrize("error", [None, ValueError("no base")])
def test_the_thread_that_loads_has_ended(error: Exception | None) -> None:
    """When the base is loaded, or could not be, its thread and the threads that torch began for it have ended."""
    ours, theirs = socket.socketpair()
    before = {path.name for path in Path("/proc/self/task").iterdir()}

    def compute() -> object:
        if error is not None:
            raise error
        return "loaded"

    with ours, theirs:
        assert _load_in_thread(compute, theirs) == (error or "loaded")
    assert {path.name for path in Path("/proc/self/task").iterdir()} <= before


def test_a_fork_that_computes_otherwise_is_refused(tiny_base: Path) -> None:
    """An engine whose logits are not those of the process that loaded the base does not begin."""
    loaded = load(RunnerConfig(folder=str(tiny_base), name="tiny", kv_cache_bytes=2**20, num_threads=1))
    loaded.runner.enter_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded.runner, "_probe_logits", loaded.runner._probe_logits + 1e-6)
        with pytest.raises(RuntimeError, match="computes otherwise"):
            loaded.runner.enter_process()
