"""Ask for typed answers of a real server, and judge each: `python -m tests.server.typed --help`.

Schemas are drawn by chance; rows of all families, with schemas of their own, share the batches. Each finished answer
must be JSON that fits its schema, or a call whose arguments fit the function's. The suite asks for a few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
from rich.progress import Progress

from adapters_store.base.identity import base_identity
from adapters_store.base.resolve import resolve_base
from adapters_store.format.folder import MANIFEST, read_folder
from adapters_store.methods import method_of
from adapters_store.tools.formats import FORMATS
from tests.kit.adapters import zip_folder
from tests.kit.families import FAMILIES
from tests.kit.schemas import object_of, schema_of
from tests.kit.server import serve
from tests.kit.tiny import make_tiny_base

METHODS = ("lora", "dora", "ia3", "bottleneck-houlsby", "prompt-tuning", "prefix-tuning", "beft", "oft")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 2, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.1, "frequency_penalty": 1},
)
NUM_AT_ONCE = 16


@dataclass
class Tally:
    """Answers by how they ended: `fits`, `cut` at their most tokens, or `refused`; and those that are wrong."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.ended.items()))
        return "\n  ".join([f"{counts}, {len(self.wrong)} wrong", *self.wrong[:20]])


def asks_for_json(number: int, tasks: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the request `number` for JSON, and the schema that its answer must fit."""
    chance = random.Random(number)
    schema = schema_of(chance)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _asked(chance, number, tasks) | {"response_format": form}, schema


def asks_for_a_call(number: int, tasks: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the request `number` for calls of one of two functions, or of a named one, and the schemas by name."""
    chance = random.Random(number)
    schemas = {f"f{place}": object_of(chance, 1) for place in range(2)}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in schemas.items()]
    named = {"type": "function", "function": {"name": "f1"}}
    choice = chance.choice(["required", named])
    more = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": chance.random() < 0.3}
    return _asked(chance, number, tasks) | more, {"f1": schemas["f1"]} if choice == named else schemas


def _asked(chance: random.Random, number: int, tasks: list[str]) -> dict[str, Any]:
    turn = {"role": "user", "content": f"Say {number}"}
    return {
        "model": tasks[number % len(tasks)],
        "messages": [turn],
        "max_tokens": 500,
        "seed": number,
        **chance.choice(SAMPLINGS),
    }


def judge(answer: httpx2.Response, wanted: dict[str, Any], is_call: bool, tally: Tally) -> None:
    """Count an answer, and keep it if it is wrong."""
    if answer.status_code == 400:
        tally.ended[f"refused ({answer.json()['error']['param']})"] += 1
        return
    choice = answer.raise_for_status().json()["choices"][0]
    if choice["finish_reason"] == "length":
        tally.ended["cut"] += 1
        return
    try:
        if is_call:
            calls = choice["message"].get("tool_calls", [])
            fits = bool(calls) and choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
            for call in calls:
                fits &= jsonschema_rs.is_valid(
                    wanted[call["function"]["name"]], json.loads(call["function"]["arguments"])
                )
        else:
            fits = jsonschema_rs.is_valid(wanted, json.loads(choice["message"]["content"]))
    except (ValueError, KeyError):
        fits = False
    tally.ended["fits"] += fits
    if not fits:
        tally.wrong.append(f"{json.dumps(wanted)}: {json.dumps(choice['message'])}")


async def ask(url: str, tasks: list[str], num: int, is_call: bool) -> Tally:
    """Ask for so many typed answers, `NUM_AT_ONCE` at a time; tasks take turns."""
    tally, numbers, draw = Tally(), iter(range(num)), asks_for_a_call if is_call else asks_for_json

    async def work(http: httpx2.AsyncClient, bar: Progress) -> None:
        for number in numbers:
            body, wanted = draw(number, tasks)
            judge(await http.post("/v1/chat/completions", json=body), wanted, is_call, tally)
            bar.advance(bar.task_ids[0])

    async with httpx2.AsyncClient(base_url=url, timeout=600) as http:
        with Progress(transient=True) as bar:
            bar.add_task("calls" if is_call else "schemas", total=num)
            await asyncio.gather(*(work(http, bar) for _ in range(NUM_AT_ONCE)))
    return tally


def make_artifacts(base: Path, folder: Path) -> dict[str, bytes]:
    """Make an artifact a method, whose manifests name the formats of calls in turn, and one that has texts for them."""
    forms = [*FORMATS, {"call_begin": "<call>", "call_end": "</call>"}]
    found = {}
    identity = {"name": "base", "identity": base_identity(base).identity, "weights": "0" * 64}
    for place, method in enumerate(METHODS):
        made = FAMILIES[method](folder / method, base, 1)
        served = method_of(read_folder(made)).name
        manifest = {"format_version": 1, "method": served, "base": identity, "tools": forms[place % len(forms)]}
        (made / MANIFEST).write_text(json.dumps(manifest))
        found[method] = zip_folder(made)
    return found


async def main() -> int:
    """Run the command. Returns 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=2000, help="of each task: the base and eight adapters")
    parser.add_argument("--calls", type=int, default=2000, help="in all")
    parser.add_argument("--base", default="tiny", help="tiny, or what `manyhats serve --base` takes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tiny = partial(make_tiny_base, max_position_embeddings=4096)  # prompts of bytes are long
        base = tiny(scratch / "base") if given.base == "tiny" else resolve_base(given.base)
        bodies = make_artifacts(base, scratch)
        with serve(base, scratch / "data", log_level="error", tool_format="hermes") as server:
            for task, body in bodies.items():
                server.upload(task, body)
            tasks = ["base", *bodies]
            tallies = [
                await ask(server.url, tasks, given.schemas * len(tasks), False),
                await ask(server.url, tasks, given.calls, True),
            ]
    for name, tally in zip(("JSON", "calls"), tallies, strict=True):
        print(f"{name}: {tally}")
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
