"""The side of the OpenVINO peer that runs in its own environment: a JSON line in, JSON lines out. Nothing of ours.

Adapters are put on by `generate` alone: what `add_request` is told of them is passed over in silence, and what was put
on last stays. So one adapter, or none, is put on once and then asked step by step, which gives each token's time;
groups of different adapters are each one call of `generate`, which tells the end alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy
import openvino
import openvino_genai as genai
import psutil

MAX_BATCH_TOKENS = 512
CACHE_GIB = 1
Item = dict[str, Any]


class Model:
    """The base, with room for all adapters or without any, loaded when it is asked for; one of the two at a time."""

    def __init__(self, job: Item) -> None:
        self.job, self.has_room = job, False
        self.pipe: Any = None  # of OpenVINO, which is not here to be checked
        self.adapters = [genai.Adapter(one["file"]) for one in job["adapters"]]

    def get(self, has_room: bool) -> Any:
        """The pipeline."""
        if self.pipe is None or self.has_room != has_room:
            self.pipe = None  # before the other one is loaded
            self.has_room, self.pipe = has_room, self._load(has_room)
        return self.pipe

    def _load(self, has_room: bool) -> Any:
        plan = genai.SchedulerConfig()
        plan.cache_size, plan.max_num_batched_tokens = CACHE_GIB, MAX_BATCH_TOKENS
        plan.enable_prefix_caching = False
        # By default a CPU that multiplies bf16 does so; all others here compute in fp32.
        options = {"INFERENCE_NUM_THREADS": self.job["num_threads"], "INFERENCE_PRECISION_HINT": "f32"}
        if has_room:
            options["adapters"] = genai.AdapterConfig(self.adapters)
        return genai.ContinuousBatchingPipeline(self.job["model"], plan, "CPU", options)

    def config(self, request: Item, max_tokens: int | None = None) -> Any:
        """Greedy, of exactly so many tokens, and what it wears."""
        config = genai.GenerationConfig()
        config.max_new_tokens = request["max_tokens"] if max_tokens is None else max_tokens
        config.ignore_eos, config.do_sample = True, False
        if request["adapter"] is not None:
            number = request["adapter"]
            config.adapters = genai.AdapterConfig(self.adapters[number], self.job["adapters"][number]["scale"])
        return config


def tensor(request: Item) -> Any:
    """The prompt."""
    return openvino.Tensor(numpy.array([request["prompt"]], dtype=numpy.int64))


def stepped(model: Model, requests: list[Item], num: int, began: float, on_done: Callable[[int], None]) -> list[Item]:
    """Closed loop: `num` at once, all with what is put on now. -> timings as the bench has them."""
    pipe, waiting, timings = model.get(model.has_room), iter(enumerate(requests)), list[Item]()
    running = dict[int, tuple[Item, float, Any, list[tuple[float, int]]]]()

    def admit() -> None:
        for place, request in waiting:
            started = time.perf_counter() - began
            running[place] = request, started, pipe.add_request(place, tensor(request), model.config(request)), []
            if len(running) >= num:
                return

    admit()
    while running:
        pipe.step()
        now = time.perf_counter() - began
        for place, (request, started, handle, pieces) in list(running.items()):
            while handle.can_read():
                pieces.append((now, sum(len(out.generated_ids) for out in handle.read().values())))
            if sum(size for _, size in pieces) >= request["max_tokens"]:
                timings.append(timing(request, started, now, pieces))
                del running[place]
                on_done(1)
        if len(running) < num:
            admit()
    while pipe.has_non_finished_requests():
        pipe.step()
    return timings


def timing(request: Item, started: float, ended: float, pieces: list[tuple[float, int]]) -> Item:
    """The fields of the bench's `Timing`."""
    times = [at for at, _ in pieces]
    gaps = [after - before for before, after in pairwise(times)]
    whole = {"num_prompt": len(request["prompt"]), "num_tokens": request["max_tokens"]}
    said = {"first": times[0], "gaps": gaps, "sizes": [size for _, size in pieces]} if pieces else {}
    return {**whole, "started": started, "ended": ended, **said}


def grouped(model: Model, requests: list[Item], num: int, began: float, on_done: Callable[[int], None]) -> list[Item]:
    """Windows of `num` requests that came together, each adapter's group of them in one call."""
    timings = []
    for window in windows(requests, num):
        started = time.perf_counter() - began
        for group in groups(window):
            configs = [model.config(request) for request in group]
            answers = model.get(True).generate([tensor(request) for request in group], configs)
            ended = time.perf_counter() - began
            for request, answer in zip(group, answers, strict=True):
                num_tokens = len(answer.m_generation_ids[0])
                if num_tokens != request["max_tokens"]:
                    raise RuntimeError(f"{num_tokens} of {request['max_tokens']} tokens came")
                timings.append(timing(request, started, ended, []))
            on_done(len(group))
    return timings


def windows(requests: list[Item], num: int) -> Iterator[list[Item]]:
    """The requests in order, `num` at a time."""
    for first in range(0, len(requests), num):
        yield requests[first : first + num]


def groups(window: list[Item]) -> Iterator[list[Item]]:
    """Those of equal adapter together."""
    for _, group in groupby(sorted(window, key=lambda one: one["adapter"]), key=lambda one: one["adapter"]):
        yield list(group)


def run(model: Model, job: Item) -> Item:
    """One workload."""
    requests, num, worn = job["requests"], job["concurrency"], {one["adapter"] for one in job["requests"]}
    pipe = model.get(worn != {None})
    pipe.generate([tensor(requests[0])], [model.config(requests[0], max_tokens=4)])  # warms up, and puts it on
    ask = stepped if len(worn) == 1 else grouped
    began = time.perf_counter()
    timings = ask(model, requests, num, began, lambda done: say({"done": done}))
    seconds, pss = time.perf_counter() - began, psutil.Process().memory_full_info().pss
    return {"seconds": seconds, "timings": timings, "pss_mib": pss / 2**20}


def say(message: Item) -> None:
    """One line to the bench."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """The first job is what to load, every other one a workload."""
    jobs = map(json.loads, sys.stdin)
    model = Model(next(jobs))
    say({})
    for job in jobs:
        say(run(model, job))


if __name__ == "__main__":
    main()
