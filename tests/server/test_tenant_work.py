"""Work whose cost is a stranger's choice stands in nobody else's way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import server
from server.requests import prepare
from tests.kit.adapters import zip_folder
from tests.server.api.test_tenants import open_city
from tests.server.world import error_of, until

pytestmark = pytest.mark.anyio
LONG = "abcd " * 20
NUM_SLOW = 64
# Whose threads are asyncio's own: a start of the server, and bytes that go to the disk.
OWN_THREADS = {
    "api/health.py": 1,
    "app.py": 1,
    "cli/serve.py": 1,
    "engine/engine_process.py": 1,
    "uploads/preload.py": 4,
    "uploads/service.py": 1,
}


@pytest.fixture(autouse=True)
def _is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a text of a hundred characters as a long one."""
    monkeypatch.setattr(prepare, "THREAD_CHARS", len(LONG) - 1)


class Slow:
    """Makes functions slow: each waits until `open`, the first call of a thread says that it has begun."""

    def __init__(self) -> None:
        self.num_begun, self._open = 0, Event()

    def of(self, function: Callable[..., Any], is_slow: Callable[..., bool]) -> Callable[..., Any]:
        """A function that waits if its arguments are slow ones."""

        def call(*args: Any) -> Any:
            if is_slow(*args):
                self.num_begun += 1
                assert self._open.wait(20)
            return function(*args)

        return call

    def open(self) -> None:
        """Let all through."""
        self._open.set()


async def test_slow_prompts_of_one_tenant_delay_no_other(
    tiny_base: Path, tmp_path: Path, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While 64 slow prompts of a tenant are tokenised, another's long prompt, chat, upload and list are answered.

    The tenant's own tasks are resolved and counted meanwhile, too.
    """
    slow = Slow()
    async with open_city(tiny_base, tmp_path / "data") as city:
        mine, theirs = await city.tenant("mine"), await city.tenant("theirs")
        tokenizer = city.site.state.tokenizer
        monkeypatch.setattr(tokenizer, "encode", slow.of(tokenizer.encode, lambda text, *_: text.startswith("slow")))
        asked = [asyncio.create_task(city.generate(theirs, prompt=f"slow {LONG}")) for _ in range(NUM_SLOW)]
        try:
            await until(lambda: slow.num_begun)
            async with asyncio.timeout(20):
                assert (await city.generate(mine, prompt=LONG)).status_code == 200
                turns = [{"role": "user", "content": "x"}]
                chat = await city.ask(mine, "POST", "/generate?task=base", {"messages": turns, "max_tokens": 1})
                assert chat.status_code == 200, chat.text
                upload = await city.ask(mine, "POST", "/adapters?task=t", zip_folder(loras[0]))
                assert upload.status_code == 201, upload.text
                assert (await city.ask(mine, "GET", "/tasks")).status_code == 200
                assert (await city.generate(theirs)).status_code == 200
                assert (await city.ask(theirs, "GET", "/tasks/base")).status_code == 200
            assert slow.num_begun < NUM_SLOW
        finally:
            slow.open()
        answers = await asyncio.gather(*asked)
        assert {answer.status_code for answer in answers} == {200}


async def test_a_full_queue_is_429(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant whose requests wait to be prepared is told when to ask again, and it shows in the metrics."""
    slow = Slow()
    async with open_city(tiny_base, tmp_path / "data", max_waiting=2) as city:
        key = await city.tenant("theirs")
        tokenizer = city.site.state.tokenizer
        monkeypatch.setattr(tokenizer, "encode", slow.of(tokenizer.encode, lambda text, *_: text.startswith("slow")))
        asked = [asyncio.create_task(city.generate(key, prompt=f"slow {LONG}")) for _ in range(NUM_SLOW)]
        await until(lambda: any(task.done() for task in asked))
        slow.open()
        answers = await asyncio.gather(*asked)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and len(refused) < NUM_SLOW
        assert {(error_of(one)["param"], one.headers["retry-after"]) for one in refused} == {("max_waiting", "1")}
        metrics = (await city.admin("GET", "/metrics")).text
        assert f'limit="max_waiting",tenant="theirs"}} {float(len(refused))}' in metrics


def test_no_room_uses_threads_that_all_share() -> None:
    """Only what no stranger can make slow runs in asyncio's own threads."""
    root = Path(server.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        if num_calls := len(re.findall(r"\.(?:to_thread|run_in_executor)\(", path.read_text())):
            found[str(path.relative_to(root))] = num_calls
    assert found == OWN_THREADS
