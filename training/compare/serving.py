"""Cost of each artifact on the real engine: a `manyhats serve` is started, and asked over HTTP as by any user."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from adapters_store.format.archive import ZIP_TYPE, zipped
from adapters_store.format.folder import MANIFEST, read_files, read_manifest
from training.compare.results import ServerFigures, Serving
from training.errors import TrainingError
from training.http_client import RequestError, ask

NUM_REQUESTS, NUM_TOKENS, NUM_ROUNDS = 8, 64, 3
NUM_TRIES = 3  # of an upload
NUM_WARM_UP = 4  # tokens of each request, before the measurement
MAX_PROMPT_TOKENS = 128  # so that decoding is measured, and not prefill
READY_WITHIN_S, ANSWER_WITHIN_S, STOP_WITHIN_S = 900, 300, 30  # the first start compiles kernels
BASE = "base"  # the task that is the base itself


class ServingError(TrainingError):
    """The server did not become ready, or refused a request."""


@dataclass(frozen=True)
class Served:
    """Figures of the server itself and of every method, and the reasons why methods could not be served."""

    server: ServerFigures
    methods: dict[str, Serving]
    refused: dict[str, str]


@contextmanager
def start_server(base: str, device: str, cache: Path | None) -> Iterator[httpx2.Client]:
    """Run a server of `base` on a free loopback port, with a data folder of its own, and give a client of it.

    Raises `ServingError` with the end of its log if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="manyhats-compare-") as folder:
        port = free_port()
        flags = {"base": base, "data": folder, "host": "127.0.0.1", "port": port, "device": device}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += [] if cache is None else ["--cache", str(cache)]
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-m", "server", "serve", *words], stdout=out, stderr=subprocess.STDOUT, env=_plain()
            )
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_WITHIN_S) as client:
                _wait(client, process, log)
                yield client
        finally:
            stop(process, STOP_WITHIN_S)


def measure(client: httpx2.Client, folders: Mapping[str, Path], on_batch: Callable[[], None]) -> Served:
    """Upload every artifact, and let batches of it and of the base decode alternately, round after round.

    Each batch is compared with the mean of the base's before and after it; the median of the rounds counts.
    `on_batch` is called after each batch.
    """
    uploaded, refused = _upload_all(client, folders)
    prompts = _prompts(folders)
    _decode(client, BASE, prompts, NUM_WARM_UP)
    for task in [*uploaded]:
        try:
            _decode(client, task, prompts, NUM_WARM_UP)
        except ServingError as error:  # of this adapter alone: the others are served
            refused[task] = str(error)
            del uploaded[task]
            _await_ready(client, lambda: True)
    rates: dict[str, list[float]] = {task: [] for task in uploaded}
    shares: dict[str, list[float]] = {task: [] for task in uploaded}
    bases = [_decode(client, BASE, prompts, NUM_TOKENS)]
    for task in [*uploaded] * NUM_ROUNDS:
        rates[task].append(_decode(client, task, prompts, NUM_TOKENS))
        bases.append(_decode(client, BASE, prompts, NUM_TOKENS))
        shares[task].append(rates[task][-1] / statistics.mean(bases[-2:]))
        on_batch()
    methods = {
        task: Serving(statistics.median(rates[task]), statistics.median(shares[task]), seconds, response["slot_bytes"])
        for task, (seconds, response) in uploaded.items()
    }
    return Served(ServerFigures(len(prompts), NUM_TOKENS, NUM_ROUNDS, statistics.median(bases)), methods, refused)


def _upload_all(
    client: httpx2.Client, folders: Mapping[str, Path]
) -> tuple[dict[str, tuple[float, dict[str, Any]]], dict[str, str]]:
    """Upload artifacts by method; return (seconds, the server's response) of each, and the reasons of refusals."""
    uploaded, refused = {}, {}
    for method, folder in folders.items():
        try:
            uploaded[method] = _upload(client, method, zipped(read_files(folder)))
        except RequestError as error:
            refused[method] = f"the server refused it: {error.reason}"
    return uploaded, refused


def _upload(client: httpx2.Client, task: str, body: bytes, num_tries: int = NUM_TRIES) -> tuple[float, dict[str, Any]]:
    """Upload an artifact, again if the server is busy; return the seconds and its response. Raises `RequestError`."""
    began = time.monotonic()
    try:
        response = ask(
            client.request,
            "POST",
            "/adapters",
            params={"task": task},
            content=body,
            headers={"Content-Type": ZIP_TYPE},
        )
    except RequestError as error:
        is_busy = (error.status or 0) >= httpx2.codes.INTERNAL_SERVER_ERROR  # compiling kernels maybe
        if not is_busy or num_tries == 1:
            raise
        return _upload(client, task, body, num_tries - 1)
    return time.monotonic() - began, response.json()


def _prompts(folders: Mapping[str, Path]) -> list[list[int]]:
    """Return prompts of the task: those of an artifact's parity, repeated if they are too few."""
    manifest = read_manifest((next(iter(folders.values())) / MANIFEST).read_bytes())
    prompts = [case.prompt_token_ids[-MAX_PROMPT_TOKENS:] for case in manifest.parity]
    return [prompts[i % len(prompts)] for i in range(NUM_REQUESTS)]


def _decode(client: httpx2.Client, task: str, prompts: list[list[int]], num_tokens: int) -> float:
    """Return decode tokens/s, from the first token on, summed over requests at once. Raises `ServingError`."""

    def rate(prompt: list[int]) -> float:
        body = {"prompt_token_ids": prompt, "max_tokens": num_tokens, "ignore_eos": True}
        try:
            response = ask(client.request, "POST", "/generate", params={"task": task}, json=body)
        except RequestError as error:
            raise ServingError(f"the server did not answer for {task}: {error.reason}") from error
        timing: dict[str, float] = response.json()["timing"]
        return (num_tokens - 1) / max((timing["total_ms"] - timing["ttft_ms"]) / 1000, 1e-9)

    with ThreadPoolExecutor(len(prompts)) as clients:
        return sum(clients.map(rate, prompts))


def free_port() -> int:
    """Return a loopback port that is free just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _plain() -> dict[str, str]:
    """Return the environment without the settings of the user's own server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MANYHATS_")}


def _wait(client: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    if not _await_ready(client, lambda: process.poll() is None):
        state = "is not ready yet" if process.returncode is None else f"ended with {process.returncode}"
        raise ServingError(f"the server {state}; its log ends: {log.read_text(errors='replace')[-1000:]}")


def _await_ready(client: httpx2.Client, may_come: Callable[[], bool]) -> bool:
    """Wait until the server is ready; tell whether it became so in time, and while `may_come` held."""
    until = time.monotonic() + READY_WITHIN_S
    while may_come() and time.monotonic() < until:
        try:
            if client.get("/health/ready").status_code == httpx2.codes.OK:
                return True
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    return False


def stop(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Ask a process to end, and kill it if it has not within `within_s` seconds."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
