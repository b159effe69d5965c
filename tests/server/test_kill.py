"""A real server that is killed with SIGKILL: what was answered is paid for, and what was stored is there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.kit.server import Server, serve

pytestmark = pytest.mark.timeout(600)
SMALL: dict[str, Any] = {"precision": "fp32", "num_threads": 1, "kv_cache_bytes": "8MiB", "max_running": 8}
NUM_CLIENTS, NUM_ANSWERS = 4, 24
BODY = {"prompt_token_ids": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}


def ask(server: Server, tasks: list[str], number: int, answered: list[str]) -> None:
    """Send requests in turn, every second one streamed, until the server is gone; whole answers are written down."""
    try:
        while True:
            task = tasks[(number + len(answered)) % len(tasks)]
            body, query = BODY | {"stream": len(answered) % 2 == 0}, {"task": task}
            answer = httpx2.post(f"{server.url}/generate", params=query, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            if not body["stream"] or answer.text.endswith("[DONE]\n\n"):
                answered.append(task)
    except httpx2.TransportError:
        return


def stream(server: Server, number: int, said: list[str]) -> None:
    """Keep the last line of a stream, or the error that cut it."""
    body = BODY | {"stream": True, "max_tokens": 900, "seed": number}
    try:
        said[number] = httpx2.post(f"{server.url}/generate?task=base", json=body, timeout=60).text.split()[-1]
    except httpx2.TransportError as error:
        said[number] = repr(error)


@pytest.mark.parametrize("heard_by", ["every process", "the group", "the front"])
def test_a_stop_drains_whoever_hears_it(tiny_base: Path, tmp_path: Path, heard_by: str) -> None:
    """SIGTERM to the front, to its group or to all of its processes: running streams end well, then all processes."""
    said = [""] * 8
    with serve(tiny_base, tmp_path, **SMALL, max_batch_tokens=16, drain_s=100) as server:
        processes = server.processes()
        assert len(processes) > 1
        clients = [threading.Thread(target=stream, args=(server, number, said)) for number in range(len(said))]
        for client in clients:
            client.start()
        while "manyhats_engine_num_running 8.0" not in httpx2.get(f"{server.url}/metrics").text:
            assert any(client.is_alive() for client in clients), said
        if heard_by == "the group":
            os.killpg(server.process.pid, signal.SIGTERM)
        for process in processes if heard_by == "every process" else processes[: heard_by == "the front"]:
            process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert server.process.wait(60) == 0
    assert said == ["[DONE]"] * 8
    _, alive = psutil.wait_procs(processes, 5)
    assert not alive


def used(server: Server) -> dict[str, dict[str, int]]:
    """The usage of each task, by GET /usage."""
    rows = httpx2.get(f"{server.url}/usage").raise_for_status().json()["usage"]
    return {row["task"]: row for row in rows}


def test_usage_survives_a_kill(tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """Killed while it answers: after the restart the usage of every answer that came whole is there, by task, and of
    no more than those that were on their way; what was uploaded is served."""
    answered: list[list[str]] = [[] for _ in range(NUM_CLIENTS)]
    with serve(tiny_base, tmp_path, **SMALL) as server:
        server.upload("hat", zips[0])
        work: list[tuple[Any, ...]] = [(server, ["base", "hat"], number, mine) for number, mine in enumerate(answered)]
        clients = [threading.Thread(target=ask, args=one) for one in work]
        for client in clients:
            client.start()
        while sum(map(len, answered)) < NUM_ANSWERS and any(client.is_alive() for client in clients):
            clients[0].join(0.01)
        server.process.kill()
        for client in clients:
            client.join()
    tasks = [task for mine in answered for task in mine]
    assert len(tasks) >= NUM_ANSWERS
    with serve(tiny_base, tmp_path, **SMALL) as server:
        found = used(server)
        for task in ("base", "hat"):
            count, row = tasks.count(task), found[task]
            assert count <= row["requests"] <= count + NUM_CLIENTS
            assert row["prompt_tokens"] >= 3 * count and row["completion_tokens"] >= 5 * count
        again = httpx2.post(f"{server.url}/generate", params={"task": "hat"}, json=BODY, timeout=60)
        assert again.status_code == 200 and again.json()["adapter"]["version"] == 1
