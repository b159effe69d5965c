"""Workloads are data: which requests, of which lengths, for which adapters, how many at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).parent
FOLDER = HERE / "workloads"
CORPUS = HERE / "data" / "gsm8k.txt"


class Request(msgspec.Struct, array_like=True):
    """`num_prompt` tokens of the corpus from token `offset` on; `adapter` is a number, or None for the base."""

    adapter: int | None
    offset: int
    num_prompt: int
    max_tokens: int


class Workload(msgspec.Struct, omit_defaults=True):
    """`adapters` are `num_adapters` LoRA of equal form: `lora` are arguments of `make_lora`, the number is the seed.

    With `num_prefix`, every prompt begins with so many tokens of the corpus from `prefixes[adapter]` on. With `load`,
    the loop is open: request i is sent at `arrivals[i]`, which are of one request/s on average, divided by `load` times
    the capacity.
    """

    name: str
    title: str
    concurrency: int
    num_adapters: int
    lora: dict[str, Any]
    requests: list[Request]
    num_prefix: int = 0
    prefixes: list[int] = []
    load: float | None = None
    arrivals: list[float] = []


class Prompted(msgspec.Struct):
    """A request with its prompt as the base's token ids: what every peer is given.

    `num_virtual` are the virtual tokens that its adapter puts before it.
    """

    adapter: int | None
    prompt: list[int]
    max_tokens: int
    num_virtual: int = 0


def names() -> list[str]:
    """The committed workloads, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def parts() -> list[str]:
    """What can be chosen: "W3" for "W3" and "W3-uniform"."""
    return list(dict.fromkeys(name.partition("-")[0] for name in names()))


def read(name: str, num_requests: int | None = None) -> Workload:
    """One committed workload, or its first `num_requests` requests."""
    workload = msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=Workload)
    workload.requests = workload.requests[:num_requests]
    return workload


def write(workload: Workload) -> None:
    """Commit a workload: one request a line."""
    fields = msgspec.to_builtins(workload)
    requests = fields.pop("requests")
    head = msgspec.json.format(msgspec.json.encode(fields), indent=1).decode().removesuffix("\n}")
    lines = ",\n".join("  " + msgspec.json.encode(request).decode() for request in requests)
    (FOLDER / f"{workload.name}.json").write_text(f'{head},\n "requests": [\n{lines}\n ]\n}}\n')


def prompted(workload: Workload, corpus: list[int]) -> list[Prompted]:
    """Cut the prompts from the corpus' token ids. Raises `ValueError` where it is too short for this base."""
    longest = max(request.offset + request.num_prompt for request in workload.requests)
    longest = max(longest, *(offset + workload.num_prefix for offset in workload.prefixes), 0)
    if longest > len(corpus):
        raise ValueError(f"{workload.name} needs a corpus of {longest} tokens; of this base it has {len(corpus)}")
    return [
        Prompted(request.adapter, _prefix(workload, request, corpus) + _cut(request, corpus), request.max_tokens)
        for request in workload.requests
    ]


def _cut(request: Request, corpus: list[int]) -> list[int]:
    return corpus[request.offset : request.offset + request.num_prompt]


def _prefix(workload: Workload, request: Request, corpus: list[int]) -> list[int]:
    if not workload.num_prefix or request.adapter is None:
        return []
    first = workload.prefixes[request.adapter]
    return corpus[first : first + workload.num_prefix]
