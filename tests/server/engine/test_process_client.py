"""The client against a real process over a real socket; only the model is a fake."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from server.core import AdapterRef, Sampling
from server.engine.client import EngineStartError, EngineUnavailable
from server.engine.engine_process import Patience
from server.engine.messages import Output, Submit
from server.engine.process_client import ProcessEngineClient
from server.model.fake import answer_alone
from tests.server.engine.fake_process import POISON
from tests.server.engine.world import config

COMMAND = (sys.executable, "-m", "tests.server.engine.fake_process")
FAST = Patience(first_retry=0.05, max_retry=0.4, loading=30.0, silence=3.0, closing=2.0)
PROMPT = [10, 11, 12]


@contextlib.asynccontextmanager
async def engine(name: str = "fake", patience: Patience = FAST) -> AsyncIterator[ProcessEngineClient]:
    client = ProcessEngineClient(config(name), command=COMMAND, patience=patience)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def request(name: str, *digests: str, max_tokens: int = 20, timeout: float = 60) -> Submit:
    now, sampling = time.monotonic(), Sampling(max_tokens=max_tokens, ignore_eos=True)
    return Submit(name, "t", PROMPT, sampling, now + timeout, now, tuple(AdapterRef(digest) for digest in digests))


async def answer(client: ProcessEngineClient, submit: Submit) -> list[Output]:
    return [output async for output in client.generate(submit)]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def alone(submit: Submit) -> list[int]:
    adapters = [(adapter.digest, adapter.weight) for adapter in submit.adapters]
    num_virtual = sum(adapter.num_virtual for adapter in submit.adapters)
    limits: dict[str, Any] = {"vocab_size": 512, "eos_token_ids": [0], "max_sequence_tokens": 256}
    return answer_alone(submit.prompt, adapters, submit.sampling, num_virtual, **limits)[0]


def failure_of(outputs: list[Output]) -> str | None:
    """The code that a request failed with."""
    failure = outputs[-1].failure
    return None if failure is None else failure.code


def replace_patience(**seconds: float) -> Patience:
    """The tests' patience, but for `seconds`."""
    return dataclasses.replace(FAST, **seconds)


async def until(is_so: Callable[[], bool], seconds: float = 10) -> float:
    """Wait until something is so, and return the seconds that it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def engines() -> list[psutil.Process]:
    """The processes of clients that are there; other tests may have left others."""
    mine = [found for found in psutil.process_iter(["ppid", "cmdline"]) if found.info["ppid"] == os.getpid()]
    return [found for found in mine if "--socket" in (found.info["cmdline"] or ())]


async def until_next_stats(client: ProcessEngineClient) -> None:
    """Wait until the engine has said something, or another one has."""
    before = client.stats
    await until(lambda: client.stats is not before)


async def kill(client: ProcessEngineClient) -> None:
    """Kill the engine, and wait until the client has seen it."""
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.ready is None)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_requests_run_together_and_each_gets_its_own() -> None:
    """Thirty requests at once, with and without adapters, get over the socket what each gets alone."""

    async def main() -> None:
        async with engine() as client:
            requests = [request(f"r{at}", *[f"digest{at % 5}"] * (at % 3 > 0)) for at in range(30)]
            answers = await asyncio.gather(*(answer(client, submit) for submit in requests))
            for submit, outputs in zip(requests, answers, strict=True):
                assert tokens(outputs) == alone(submit)
                assert outputs[-1].finish_reason == "length"

    run(main)


def test_ready_residency_stats_and_forget() -> None:
    """The engine describes itself, says where adapters are, counts, and forgets on demand."""

    async def main() -> None:
        async with engine() as client:
            assert client.ready is not None and client.ready.spec.name == "fake"
            await answer(client, request("r", "digest"))
            assert await client.residency() == {"digest": "slot"}
            failed = await answer(client, request("s", "bad"))
            assert failed[-1].failure and failed[-1].failure.code == "adapter_failed"
            assert (await client.residency())["bad"] == "failed"
            client.discard("digest")
            assert "digest" not in await client.residency()
            assert client.stats.tokens_total >= 22
            assert client.stats.loads_total == 1

    run(main)


def test_stats_come_when_idle() -> None:
    """An idle engine sends its state about once a second."""

    async def main() -> None:
        async with engine() as client:
            before = client.stats
            assert await until(lambda: client.stats is not before) < 2.5
            before = client.stats
            assert 0.5 < await until(lambda: client.stats is not before) < 2.5

    run(main)


def test_closing_the_iterator_aborts() -> None:
    """A client that stops listening frees the sequence in the engine."""

    async def main() -> None:
        async with engine("slow") as client:
            outputs = client.generate(request("r", max_tokens=200))
            await anext(outputs)
            await until(lambda: client.stats.num_running == 1)
            await outputs.aclose()
            assert await until(lambda: client.stats.num_running == 0) < 1.5  # the whole answer takes 4 s
            assert client.stats.num_blocks_used == 0

    run(main)


def test_cancelled_listener_aborts() -> None:
    """A cancelled task's sequence is freed too, also while it waits for its first token."""

    async def main() -> None:
        async with engine("slow") as client:
            task = asyncio.create_task(answer(client, request("r", max_tokens=200)))
            await until(lambda: client.stats.num_running == 1)
            task.cancel()
            assert await until(lambda: client.stats.num_running == 0) < 1.5

    run(main)


def various(num: int, max_tokens: int) -> list[Submit]:
    """Requests of every kind that a fake tells apart: with and without adapters, greedy and seeded, with a prefix."""
    made = []
    for at in range(num):
        submit = request(f"r{at}", *[f"digest{at % 3}"] * (at % 3), max_tokens=max_tokens)
        sampling = replace(submit.sampling, temperature=float(at % 2), seed=at)
        adapters = tuple(replace(adapter, num_virtual=at % 4) for adapter in submit.adapters)
        made.append(replace(submit, sampling=sampling, adapters=adapters, prompt=[*PROMPT, at]))
    return made


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_running_requests_go_on_when_the_engine_dies(death: signal.Signals) -> None:
    """However the process dies, running requests end as if it had not; new ones are told when to come back."""

    async def main() -> None:
        async with engine("slow") as client:
            asked = various(8, max_tokens=40)
            running = [asyncio.create_task(answer(client, submit)) for submit in asked]
            await until(lambda: client.stats.tokens_total > 60)
            pid = client.pid
            assert pid is not None
            os.kill(pid, death)
            await until(lambda: client.ready is None)
            with pytest.raises(EngineUnavailable, match="died"):
                await answer(client, request("too early"))
            assert 1 <= client.retry_after_s <= 10
            for submit, outputs in zip(asked, await asyncio.gather(*running), strict=True):
                assert tokens(outputs) == alone(submit)
                assert outputs[-1].finish_reason == "length"
                assert sum(output.timing is not None for output in outputs) == 1
            assert client.pid != pid and client.last_error is None
            assert (client.stats.deaths_total, client.stats.resumed_requests_total) == (1, 8)
            again = request("again", "digest")
            assert tokens(await answer(client, again)) == alone(again)

    run(main)


@pytest.mark.parametrize("seed", range(2))
def test_answers_are_the_same_wherever_they_are_cut(seed: int) -> None:
    """Engines that die at random moments, once a request and more often: every answer is what it is alone."""

    async def main() -> None:
        chance = random.Random(seed)
        async with engine("slow") as client:
            asked = various(16, max_tokens=40)
            running = asyncio.gather(*(answer(client, submit) for submit in asked))
            for _ in range(3):
                await until(lambda: client.ready is not None)
                await asyncio.sleep(chance.random() * 0.4)
                await kill(client)
            answers = await running
            assert [tokens(outputs) for outputs in answers] == [alone(submit) for submit in asked]

    run(main)


def test_a_request_that_kills_engines_is_not_tried_again() -> None:
    """A request that two engines died of, alone or among others, fails as harmful; the others end as they do alone."""

    async def main() -> None:
        async with engine("slow") as client:
            poison = replace(request("poison"), prompt=[POISON])
            assert failure_of(await answer(client, poison)) == "request_harmful"
            assert client.stats.deaths_total == 2
            await until(lambda: client.ready is not None)
            asked = various(6, max_tokens=35)
            running = [asyncio.create_task(answer(client, submit)) for submit in asked]
            await until(lambda: client.stats.num_running == 6)
            assert failure_of(await answer(client, replace(poison, sequence_id="another"))) == "request_harmful"
            assert client.stats.deaths_total <= 5
            answers = await asyncio.gather(*running)
            assert [tokens(outputs) for outputs in answers] == [alone(submit) for submit in asked]

    run(main)


def test_a_request_is_resumed_at_most_three_times() -> None:
    """A request whose fourth engine dies fails with a code that says to send it again."""

    async def main() -> None:
        async with engine("slow") as client:
            others = [asyncio.create_task(answer(client, submit)) for submit in various(2, max_tokens=200)]
            for _ in range(4):
                await until(lambda: client.stats.num_running == 2)
                await kill(client)
            assert {failure_of(await other) for other in others} == {"engine_restarting"}

    run(main)


def test_probes_are_not_resumed() -> None:
    """The probe of an upload fails at once if the engine dies: the upload itself may be the cause."""

    async def main() -> None:
        async with engine("slow") as client:
            probe = asyncio.create_task(answer(client, replace(request("r", max_tokens=200), is_probe=True)))
            await until(lambda: client.stats.num_running == 1)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            assert failure_of(await probe) == "engine_restarting"
            assert client.ready is None

    run(main)


@pytest.mark.parametrize("ends", ["deadline", "close", "listener"])
def test_a_request_that_waits_for_the_next_engine_can_end(ends: str) -> None:
    """A request without an engine ends by its deadline, with the client or with its listener; nothing is left."""

    async def main() -> None:
        async with engine("slow", patience=replace_patience(first_retry=30.0)) as client:
            timeout = 0.5 if ends == "deadline" else 60
            asking = asyncio.create_task(answer(client, request("r", max_tokens=200, timeout=timeout)))
            await until(lambda: client.stats.num_running == 1)
            await kill(client)
            if ends == "close":
                await client.close()
            if ends == "listener":
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            else:
                code = "deadline_exceeded" if ends == "deadline" else "engine_restarting"
                assert failure_of(await asking) == code
            assert not client.in_flight.requests

    run(main)


def test_the_listener_of_a_resumed_request_can_leave() -> None:
    """Closing the iterator of a request that was resumed frees its sequence in the new engine."""

    async def main() -> None:
        async with engine("slow") as client:
            asking = asyncio.create_task(answer(client, request("r", max_tokens=200)))
            await until(lambda: client.stats.num_running == 1)
            await kill(client)
            await until(lambda: client.stats.num_running == 1)
            asking.cancel()
            assert await until(lambda: client.stats.num_running == 0) < 1.5

    run(main)


@pytest.mark.parametrize("heard", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_is_for_the_api_process(heard: signal.Signals) -> None:
    """A signal that a supervisor or a terminal sends to every process leaves the engine running until it is told."""

    async def main() -> None:
        async with engine("slow") as client:
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            pid = client.pid
            assert pid is not None
            os.kill(pid, heard)
            assert tokens(await running) == alone(asked)
            assert client.pid == pid and client.ready is not None
        assert not psutil.pid_exists(pid)

    run(main)


def test_engine_that_says_nothing_is_replaced() -> None:
    """A stopped process is alive and silent: after a while it is ended, and a new one goes on with its requests."""

    async def main() -> None:
        async with engine("slow", patience=replace_patience(silence=1.5)) as client:
            pid = client.pid
            assert pid is not None
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            os.kill(pid, signal.SIGSTOP)
            assert await until(lambda: client.ready is None) < 4
            assert client.last_error and "said nothing for 1.5 s" in client.last_error
            assert tokens(await running) == alone(asked)
            assert not psutil.pid_exists(pid)

    run(main)


def test_a_step_that_does_nothing_is_ended() -> None:
    """A step that neither ends nor computes is no long step: the engine is ended, and again with the same request."""

    async def main() -> None:
        async with engine("hangs", patience=replace_patience(idle_step=1.5)) as client:
            assert failure_of(await answer(client, request("r"))) == "request_harmful"
            assert client.stats.deaths_total == 2
            assert client.last_error is None or "did nothing for 1.5 s" in client.last_error

    run(main)


def test_a_step_that_computes_may_take_long() -> None:
    """A step that computes for longer than an engine may be silent or idle is waited for, up to its own limit."""

    async def main() -> None:
        patience = replace_patience(silence=1.25, idle_step=1.25, step=1.0)
        async with engine("computes", patience=dataclasses.replace(patience, step=60.0)) as client:
            asked = request("r", max_tokens=2)
            assert tokens(await answer(client, asked)) == alone(asked)
            assert client.stats.deaths_total == 0
        async with engine("computes", patience=patience) as client:
            assert failure_of(await answer(client, request("r"))) == "request_harmful"

    run(main)


def test_a_client_that_was_stopped_does_not_blame_the_engine() -> None:
    """If this process did not run for longer than an engine may be silent, the engine lives on."""

    async def main() -> None:
        async with engine("slow", patience=replace_patience(silence=1.5)) as client:
            asked = request("r", max_tokens=40)
            running = asyncio.create_task(answer(client, asked))
            await until(lambda: client.stats.num_running == 1)
            time.sleep(2.5)
            assert tokens(await running) == alone(asked)
            await until_next_stats(client)
            assert client.stats.deaths_total == 0 and client.ready is not None

    run(main)


def test_restarts_wait_longer_each_time(caplog: pytest.LogCaptureFixture) -> None:
    """The waits before new engines double up to their limit, and each is told."""

    async def main() -> None:
        async with engine() as client:
            for _ in range(5):
                await kill(client)
                await until(lambda: client.ready is not None)

    run(main)
    waits = [record.wait_s for record in caplog.records if "a new one starts" in record.getMessage()]  # type: ignore[attr-defined]
    assert waits[:5] == [0.05, 0.1, 0.2, 0.4, 0.4]


CANNOT_START = [
    ("refuses", "this base has no attention"),
    ("crashes", "code 3"),
    ("garbles", "first frame cannot be read"),
]


@pytest.mark.parametrize(("name", "sentence"), CANNOT_START)
def test_first_start_that_fails_is_an_error_for_the_operator(name: str, sentence: str) -> None:
    """start() raises what the engine said, or how it ended; last_error keeps it; nothing is left."""

    async def main() -> None:
        num_files = psutil.Process().num_fds()
        client = ProcessEngineClient(config(name), command=COMMAND, patience=FAST)
        with pytest.raises(EngineStartError, match=sentence):
            await client.start()
        assert client.last_error and sentence in client.last_error
        assert client.ready is None
        await until(lambda: psutil.Process().num_fds() == num_files)
        await client.close()

    run(main)


def test_start_that_takes_too_long_is_given_up() -> None:
    """An engine that never says that it is ready is ended, so that another one can be tried."""

    async def main() -> None:
        client = ProcessEngineClient(config(name="loads"), command=COMMAND, patience=Patience(loading=0.5, closing=2.0))
        with pytest.raises(EngineStartError, match=r"did not load within 0\.5 s"):
            await client.start()
        assert not engines()

    run(main)


def test_command_that_ends_at_once_is_an_error() -> None:
    """A process that ends before it says anything makes start() raise with its exit code."""

    async def main() -> None:
        client = ProcessEngineClient(config(), command=(sys.executable, "-c", "exit(4)"), patience=FAST)
        with pytest.raises(EngineStartError, match="code 4"):
            await client.start()

    run(main)


def test_close_leaves_nothing() -> None:
    """After close() there is no process, no zombie and no socket, and running requests have failed."""

    async def main() -> None:
        num_files = psutil.Process().num_fds()
        async with engine("slow") as client:
            task = asyncio.create_task(answer(client, request("r", max_tokens=200)))
            await until(lambda: client.stats.num_running == 1)
            pid = client.pid
        outputs = await task
        assert outputs[-1].failure and outputs[-1].failure.code == "engine_restarting"
        assert "the server stopped" in outputs[-1].failure.message
        assert pid is not None and not psutil.pid_exists(pid)
        await until(lambda: psutil.Process().num_fds() == num_files)
        with pytest.raises(EngineUnavailable, match="closed"):
            await answer(client, request("late"))

    run(main)


def test_close_right_after_start_leaves_nothing() -> None:
    """Closing leaves no process even if the keeper never came to its first step."""

    async def main() -> None:
        async with engine() as client:
            pid = client.pid
        assert pid is not None and not psutil.pid_exists(pid)

    run(main)


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.05, 0.2, 0.5])
def test_start_that_is_cancelled_leaves_nothing(seconds: float) -> None:
    """Whenever a start is given up, its process and its socket go."""

    async def main() -> None:
        me = psutil.Process()
        num_files = me.num_fds()
        client = ProcessEngineClient(config(), command=COMMAND, patience=FAST)
        start = asyncio.create_task(client.start())
        await asyncio.sleep(seconds)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await client.close()
        await until(lambda: me.num_fds() == num_files and not engines())

    run(main)


def test_close_while_the_engine_loads_ends_the_start() -> None:
    """Whoever waits for an engine that is closed before it is ready is told so, and no process is left."""

    async def main() -> None:
        client = ProcessEngineClient(config("loads"), command=COMMAND, patience=FAST)
        waiting = asyncio.gather(client.start(), client.start(), return_exceptions=True)
        await until(lambda: bool(engines()))
        await client.close()
        assert [str(error) for error in await waiting] == ["the engine was closed before it was ready"] * 2
        assert not engines()

    run(main)


def test_close_ends_an_engine_that_is_stuck() -> None:
    """A process that does not end when asked is killed."""

    async def main() -> None:
        async with engine("hangs", patience=Patience(closing=0.3)) as client:
            task = asyncio.create_task(answer(client, request("r")))
            await asyncio.sleep(0.2)
            pid = client.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        await task
        assert not psutil.pid_exists(pid)

    run(main)


API_PROCESS = """
import asyncio, sys
from server.core import RunnerConfig, Sampling
from server.engine.messages import EngineConfig, Submit
from server.engine.process_client import ProcessEngineClient

async def main():
    config = EngineConfig(runner=RunnerConfig(folder="-", name=sys.argv[1]), blobs="-")
    client = ProcessEngineClient(config, command=sys.argv[2:])
    await client.start()
    print(client.pid, flush=True)
    async for _ in client.generate(Submit("r", "t", [1], Sampling(max_tokens=1), 1e18, 0.0)):
        pass
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(("name", "seconds"), [("fake", 3), ("hangs", 8)])
def test_engine_ends_with_the_api_process(name: str, seconds: float) -> None:
    """The engine ends by itself if its API process is killed, also out of the middle of a long step: no orphan."""

    async def main() -> None:
        command = [sys.executable, "-c", API_PROCESS, name, *COMMAND]
        api_process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert api_process.stdout is not None
        pid = int(await api_process.stdout.readline())
        await asyncio.sleep(0.3)
        assert psutil.pid_exists(pid)
        began = time.monotonic()
        api_process.kill()
        await api_process.wait()
        await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        assert time.monotonic() - began < seconds

    run(main)


def test_broken_frames_end_the_connection_not_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that sends what is no frame counts as dead, and another one starts."""

    def broken(_message: object) -> None:
        raise ConnectionError("no frame")

    async def main() -> None:
        async with engine() as client:
            monkeypatch.setattr(client, "_relay", broken)
            await until(lambda: client.ready is None)
            assert client.last_error and "no frame" in client.last_error
            await until(lambda: client.num_starts >= 2)

    run(main)
