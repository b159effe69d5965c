"""Answers stay right while every 30 ms something is uploaded, swapped, evicted, pinned or deleted.

`--churn-seconds 60` makes them as long as the law asks; a test's own few seconds are the same in small.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapters_store.format.folder import read_folder
from tests.golden import cases
from tests.golden.compare import MARGIN, Answer, Golden, read
from tests.kit.adapters import make_lora, zip_folder
from tests.server.world import Site, serve_real

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

EVERY_S = 0.03
NUM_TASKS, NUM_CLIENTS, NUM_SWAPPED = 6, 8, 12
SWAPS_PER_S = 200 / 60
# So few bytes that two or three of them are in slots at once, and some must be loaded again and again.
SMALL = {"slot_bytes": 96 * 2**10, "host_bytes": 160 * 2**10}


@dataclass(frozen=True)
class AdapterRef:
    """An adapter with its golden answers, one a prompt."""

    name: str
    digest: str
    body: bytes
    answers: list[Answer]


@dataclass
class Churn:
    """The state of a run: the golden requests to ask again alone, and those whose answer differed."""

    site: Site
    golden: Golden
    adapters: dict[str, AdapterRef]
    draw: random.Random
    until: float  # monotonic seconds
    needles: list[tuple[str, dict[str, Any], list[int]]] = field(default_factory=list)  # digest, request, tokens
    wrong: list[Any] = field(default_factory=list)
    num_right: int = 0
    num_changes: int = 0

    def goes_on(self) -> bool:
        """Until its time is over, and on a busy machine until something has happened."""
        few = min(self.num_right, len(self.needles), self.num_changes // 3) < 15
        return not self.wrong and (few or time.monotonic() < self.until)

    async def change(self) -> None:
        """Make the changes in order, each at its time, whether the one before has been answered or not."""
        going = set[asyncio.Task[None]]()
        while self.goes_on():
            going.add(task := asyncio.create_task(self._change_once()))
            task.add_done_callback(going.discard)
            await asyncio.sleep(EVERY_S)
        await asyncio.gather(*going)

    async def _change_once(self) -> None:
        task, draw, http = f"t{self.draw.randrange(NUM_TASKS)}", self.draw, self.site.http
        kind = draw.choice(["upload", "upload", "upload", "route", "route", "version", "task", "rollback", "pin"])
        numbers = [draw.randrange(1, 12) for _ in range(2)]
        if kind == "upload":
            answer = await self.site.upload(task, draw.choice(list(self.adapters.values())).body)
        elif kind == "route":
            answer = await http.put(f"/tasks/{task}/route", json={"versions": {str(number): 1 for number in numbers}})
        elif kind == "version":
            answer = await http.delete(f"/tasks/{task}/versions/{numbers[0]}")
        elif kind == "task":
            answer = await http.delete(f"/tasks/{task}")
        elif kind == "rollback":
            answer = await http.post(f"/tasks/{task}/rollback")
        else:
            answer = await http.put(f"/tasks/{task}/pin", json={"pinned": draw.random() < 0.5})
        self.num_changes += 1
        if answer.status_code not in (200, 201, 204, 404, 409):
            self.wrong.append((kind, answer.status_code, answer.text))

    async def ask(self) -> None:
        """Send requests in turn: golden ones are compared with their golden answer, the others are kept."""
        while self.goes_on():
            task, index = f"t{self.draw.randrange(NUM_TASKS)}", self.draw.randrange(len(self.golden.prompts))
            prompt = self.golden.prompts[index]
            body: dict[str, Any] = {"prompt_token_ids": prompt, "max_tokens": cases.FAMILY_TOKENS, "ignore_eos": True}
            is_golden = self.draw.random() < 0.5
            if not is_golden:
                body |= {"prompt_token_ids": prompt[self.draw.randrange(3) :] + prompt}
                body |= {
                    "temperature": 0.8,
                    "seed": self.draw.randrange(1000),
                    "max_tokens": self.draw.randrange(1, 30),
                }
            answer = await self.site.post(f"/generate?task={task}", body)
            if answer.status_code != 404:
                self._judge(answer, index if is_golden else None, body)

    def _judge(self, answer: Any, index: int | None, body: dict[str, Any]) -> None:
        if answer.status_code != 200:
            self.wrong.append((answer.status_code, answer.text))
            return
        found = answer.json()
        adapter, tokens = self.adapters[found["adapter"]["digest"]], found["choices"][0]["token_ids"]
        if index is None:
            self.needles.append((adapter.digest, body, tokens))
        elif is_answer(adapter.answers[index], tokens):
            self.num_right += 1
        else:
            self.wrong.append((adapter.name, index, tokens))


def is_answer(want: Answer, tokens: list[int]) -> bool:
    """Whether tokens are the golden ones, until the reference's two best tokens are too close to tell."""
    if len(tokens) != len(want.tokens):
        return False
    pairs = zip(want.tokens, tokens, want.margins, strict=True)
    return next((margin < MARGIN for wanted, got, margin in pairs if wanted != got), True)


@pytest.fixture
def golden() -> Golden:
    return read(cases.HERE / "golden_families.json")["qwen2"]


def make_hats(folder: Path, base: Path, golden: Golden) -> dict[str, AdapterRef]:
    """The adapters that the golden answers are of, by digest, but for those that would fill all slots alone."""
    names = [name for name, adapter in golden.adapters.items() if adapter.config["family"] != "lora-saved"]
    made = cases.make_adapters(folder, base, {name: golden.adapters[name].config for name in names}, golden.strength)
    adapters = [
        AdapterRef(name, read_folder(made[name]).digest, zip_folder(made[name]), golden.answers[name]) for name in names
    ]
    return {adapter.digest: adapter for adapter in adapters}


async def test_golden_and_needle_while_adapters_churn(
    anyio_backend: str, biased_base: Path, tmp_path: Path, golden: Golden, churn_seconds: float
) -> None:
    """Each answer is that of the version that it says, golden or as it is alone; slots are reused; 0 mismatches."""
    adapters = make_hats(tmp_path / "hats", biased_base, golden)
    async with serve_real(biased_base, tmp_path / "data", **SMALL, max_waiting=200) as site:
        for number, adapter in enumerate(adapters.values()):
            assert (await site.upload(f"t{number % NUM_TASKS}", adapter.body)).status_code == 201
        churn = Churn(site, golden, adapters, random.Random(0), time.monotonic() + churn_seconds)
        await asyncio.gather(churn.change(), *(churn.ask() for _ in range(NUM_CLIENTS)))
        await check_needles(churn)
        stats = site.state.client.stats
        print(f"{churn.num_changes} changes, {churn.num_right} golden, {len(churn.needles)} needles, {stats}")
        assert not churn.wrong, churn.wrong[:5]
        assert stats.evictions_total > 10 and stats.loads_total > 10, "slots were not reused"
        assert site.process.num_starts == 1


async def check_needles(churn: Churn) -> None:
    """Ask every needle again, alone."""
    for digest, adapter in churn.adapters.items():
        await churn.site.upload("alone", adapter.body)
        for body, tokens in [(body, tokens) for found, body, tokens in churn.needles if found == digest]:
            found = await churn.site.ask("alone", **body)
            assert found["adapter"]["digest"] == digest
            if found["choices"][0]["token_ids"] != tokens:
                churn.wrong.append((adapter.name, body, tokens))


@dataclass
class Swaps:
    """`routed[k]` is the version that swap k routes to; swaps up to `begun` were asked for, up to `done` answered."""

    routed: list[int]
    begun: int = 0
    done: int = 0


async def test_swaps_under_clients(anyio_backend: str, tiny_base: Path, tmp_path: Path, churn_seconds: float) -> None:
    """Every request is 200 while versions are swapped under 8 clients; each answer is one version's, and none is
    older than the last swap that was acknowledged before it was asked for."""
    made = [make_lora(tmp_path / str(seed), tiny_base, seed, r=2, strength=1.0) for seed in range(NUM_SWAPPED)]
    bodies = [zip_folder(folder) for folder in made]
    async with serve_real(tiny_base, tmp_path / "data", slot_bytes=128 * 2**10, max_waiting=100) as site:
        for body in bodies:
            assert (await site.upload("s", body)).status_code == 201
        request = {"prompt": "Once", "max_tokens": 12, "ignore_eos": True}
        alone = {number: await tokens_of(site, request, number) for number in range(1, NUM_SWAPPED + 1)}
        assert len(set(map(tuple, alone.values()))) == NUM_SWAPPED
        swaps, faults, num_answers = Swaps([NUM_SWAPPED]), list[Any](), 0

        async def swap() -> None:
            draw = random.Random(0)
            for number in range(1, int(churn_seconds * SWAPS_PER_S) + 1):
                version = draw.randrange(1, NUM_SWAPPED + 1)
                swaps.routed.append(version)
                swaps.begun = number
                if number % 3:
                    answer = await site.upload("s", bodies[version - 1])
                else:
                    answer = await site.http.put("/tasks/s/route", json={"versions": {str(version): 1}})
                assert answer.status_code == 200, answer.text
                swaps.done = number
                await asyncio.sleep(1 / SWAPS_PER_S / 2)

        async def ask() -> None:
            nonlocal num_answers
            while not swapping.done():
                oldest = swaps.done
                answer = await site.post("/generate?task=s", request)
                num_answers += 1
                if answer.status_code != 200:
                    faults.append((answer.status_code, answer.text))
                    continue
                found = answer.json()
                number, tokens = found["adapter"]["version"], found["choices"][0]["token_ids"]
                if number not in swaps.routed[oldest : swaps.begun + 1] or tokens != alone[number]:
                    faults.append((oldest, swaps.begun, number, tokens))

        swapping = asyncio.create_task(swap())
        await asyncio.gather(swapping, *(ask() for _ in range(8)))
        print(f"{swaps.done} swaps, {num_answers} answers")
        assert not faults, faults[:5]
        assert num_answers > 20


async def tokens_of(site: Site, request: dict[str, Any], number: int) -> list[int]:
    found = await site.ask("s", **request, version=number)
    tokens: list[int] = found["choices"][0]["token_ids"]
    return tokens
