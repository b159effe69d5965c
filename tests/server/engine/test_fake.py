import asyncio
from typing import Any

import pytest

from server.core import AdapterRef, EngineFailure, Row, Sampling
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.fake import FakeEngineClient, fake_ready, shift_of
from server.engine.messages import Output, Submit
from server.engine.process_client import ProcessEngineClient
from server.model.fake import FakeKVError, FakePacked, FakeRunner, FakeSlots
from tests.server.engine.world import config


def request(*digests: str, prompt: list[int] | None = None, **sampling: Any) -> Submit:
    adapters = tuple(AdapterRef(digest) for digest in digests)
    return Submit("r", "t", prompt or [5, 6, 7], Sampling(**sampling), 1e9, 0.0, adapters)


def ask(client: FakeEngineClient, submit: Submit) -> list[Output]:
    async def main() -> list[Output]:
        await client.start()
        return [output async for output in client.generate(submit)]

    return asyncio.run(main())


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_both_clients_are_engine_clients() -> None:
    """The fake and the real client fit the same seam (the type checker agrees, too)."""
    clients: list[EngineClient] = [FakeEngineClient(), ProcessEngineClient(config())]
    assert all(client.ready is None for client in clients)


def test_fake_echoes_and_stops() -> None:
    """The answer without adapters is the prompt and the end-of-sequence token; the first output has the timing."""
    outputs = ask(FakeEngineClient(), request())
    assert tokens(outputs) == [5, 6, 7, 0]
    assert [output.finish_reason for output in outputs] == [None, None, None, "stop"]
    assert [output.timing is not None for output in outputs] == [True, False, False, False]


def test_fake_answers_differ_by_adapters() -> None:
    """Every adapter and weight moves the echo by its own number."""
    assert shift_of(()) == 0
    answers = {tuple(tokens(ask(FakeEngineClient(), request(*digests)))) for digests in ((), ("a",), ("b",))}
    assert len(answers) == 3
    assert shift_of((AdapterRef("a", 0.5),)) != shift_of((AdapterRef("a"),))


def test_fake_obeys_max_tokens_and_ignore_eos() -> None:
    """max_tokens cuts with "length"; with ignore_eos the echo starts over."""
    outputs = ask(FakeEngineClient(), request(max_tokens=2))
    assert (tokens(outputs), outputs[-1].finish_reason) == ([5, 6], "length")
    assert tokens(ask(FakeEngineClient(), request(max_tokens=5, ignore_eos=True))) == [5, 6, 7, 5, 6]


def test_fake_gives_logprobs() -> None:
    """A request for logprobs gets so many alternatives for each token, the chosen one first."""
    outputs = ask(FakeEngineClient(), request(logprobs=2))
    assert [[token for token, _ in output.logprobs[0].top] for output in outputs[:1]] == [[5, 6]]


def test_fake_fails_and_dies_like_the_real_one() -> None:
    """`failure` ends requests with it; `die` fails what runs with engine_restarting and refuses what comes."""
    client = FakeEngineClient(delay_s=0.01)
    client.failure = EngineFailure("overloaded", "too many")
    assert ask(client, request())[-1].failure == client.failure
    client.failure = None

    async def main() -> None:
        await client.start()
        outputs = client.generate(request(max_tokens=100, ignore_eos=True))
        await anext(outputs)
        client.die()
        last = await anext(outputs)
        assert last.failure and last.failure.code == "engine_restarting"
        with pytest.raises(EngineUnavailable):
            await anext(client.generate(request()))
        client.revive()
        assert client.ready == fake_ready()
        outputs = client.generate(request())
        await anext(outputs)
        await outputs.aclose()
        assert client.aborted == ["r"]

    asyncio.run(main())


def runner(num_blocks: int = 4) -> FakeRunner:
    adapter_slots = FakeSlots(100)
    for digest in "ab":
        adapter_slots.insert(FakePacked(digest, 10))
    return FakeRunner(adapter_slots, num_blocks, block_size=2)


def row(tokens: list[int], start: int, blocks: list[int], *adapters: int) -> Row:
    return Row(tokens[start:], start, blocks, tuple((slot, 1.0) for slot in adapters), Sampling(), tokens, len(tokens))


def test_fake_runner_accepts_its_own_kv() -> None:
    """A continuation over the blocks that the same tokens filled runs, and its token depends on all of them."""
    fake = runner()
    fake.run([row([1, 2, 3], 0, [2, 0], 1)])
    assert fake.run([row([1, 2, 3, 4], 3, [2, 0], 1)]) == runner().run([row([1, 2, 3, 4], 0, [1, 3], 1)])
    assert fake.run([row([9, 2, 3, 4], 0, [1, 3], 1)]) != runner().run([row([1, 2, 3, 4], 0, [1, 3], 1)])


@pytest.mark.parametrize(
    "wrong",
    [
        row([1, 2, 9, 4], 3, [2, 0], 1),
        row([1, 2, 3, 4], 3, [2, 0], 0),
        row([1, 2, 3, 4], 3, [2, 0]),
        row([1, 2, 3, 4], 3, [0, 2], 1),
        row([1, 2, 3, 4], 3, [2, 3], 1),
        row([0, 1, 2, 3, 4], 4, [2, 0, 1], 1),
    ],
)
def test_fake_runner_notices_wrong_kv(wrong: Row) -> None:
    """Other tokens, another adapter, none, blocks in another order, missing KV and shifted KV all raise."""
    fake = runner()
    fake.run([row([1, 2, 3], 0, [2, 0], 1)])
    with pytest.raises(FakeKVError):
        fake.run([wrong])


def test_fake_runner_notices_shared_writes() -> None:
    """Two rows of one step that write the same block raise."""
    with pytest.raises(FakeKVError, match="share"):
        runner().run([row([1, 2], 0, [0]), row([1, 2], 0, [0])])
