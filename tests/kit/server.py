"""A real `manyhats serve` process of a test's own: started, waited for, measured, ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from training.compare import serving
from training.compare.serving import free_port

__all__ = ["MANYHATS", "Server", "free_port", "serve", "stop", "tail", "wait_for"]

MANYHATS = Path(sys.executable).parent / "manyhats"
STOP_WITHIN_S = 20


@dataclass(frozen=True)
class Server:
    """A server that is ready. `startup_seconds` is from the process's start to the first 200 of /health/ready."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    startup_seconds: float

    def processes(self) -> list[psutil.Process]:
        """The front, and the engine below it."""
        state = psutil.Process(self.process.pid)
        return [state, *state.children(recursive=True)]

    def memory(self) -> dict[str, int]:
        """Bytes of front and engine together: `rss` as each sees it, `pss` with shared pages counted once."""
        infos = [process.memory_full_info() for process in self.processes()]
        return {"rss": sum(info.rss for info in infos), "pss": sum(info.pss for info in infos)}

    def upload(self, task: str, body: bytes) -> dict[str, Any]:
        """Upload a zipped adapter as `task`, and what was answered. Raises `httpx2.HTTPStatusError` with the answer."""
        headers = {"Content-Type": "application/zip"}
        answer = httpx2.post(f"{self.url}/adapters", params={"task": task}, content=body, headers=headers, timeout=120)
        try:
            said: dict[str, Any] = answer.raise_for_status().json()
        except httpx2.HTTPStatusError as error:
            error.add_note(answer.text[:500])
            raise
        return said


@contextmanager
def serve(base: Path | str, data: Path, wait_s: float = 600, **options: object) -> Iterator[Server]:
    """Run `manyhats serve` on a free loopback port; `options` are its flags (`max_running=8` is `--max-running 8`).

    Raises `RuntimeError` with the end of the log where it does not become ready.
    """
    data.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), data / "server.log"
    flags = {"base": base, "data": data, "host": "127.0.0.1", "port": port, **options}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [MANYHATS, "serve", *words], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health/ready", process, log, began + wait_s)
        yield Server(url, process, log, time.monotonic() - began)
    finally:
        stop(process)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    """Until `url` answers 200. Raises `RuntimeError` with the end of the log where the process does not come up."""
    with httpx2.Client(timeout=5) as client:  # one for all: each loads the certificates, which takes a start's core
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if client.get(url).status_code == httpx2.codes.OK:
                    return
            time.sleep(0.05)
    state = "still starts" if process.returncode is None else f"ended with {process.returncode}"
    raise RuntimeError(f"the server {state}; its log ends:\n{tail(log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-2000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end it."""
    serving.stop(process, STOP_WITHIN_S)
