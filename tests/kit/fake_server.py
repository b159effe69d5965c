"""Servers over a fake engine that start in no time: `python -m tests.kit.fake_server BASE` imports once, then forks.

Each line on its standard input is a data folder; the answer is a line with the new server's pid and port. Blocking work
is done in one thread, so that the calls of an upload have one order, which a crash loop can go through.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

READY_WITHIN_S = 60.0


@dataclass(frozen=True)
class FakeServer:
    """One server; it may be gone."""

    pid: int
    url: str

    def is_alive(self) -> bool:
        """Whether the process is there."""
        return Path(f"/proc/{self.pid}").exists()

    def kill(self) -> None:
        """End it at once, if it is there, and wait until it is gone."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Until it is gone. Raises `TimeoutError`."""
        until = time.monotonic() + READY_WITHIN_S
        while self.is_alive():
            if time.monotonic() > until:
                raise TimeoutError(f"the server {self.pid} does not end")
            time.sleep(0.005)


class Forks:
    """The parent of many servers over one base."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextmanager
    def serve(self, data: Path) -> Iterator[FakeServer]:
        """A server that is ready; killed afterwards."""
        assert self._process.stdin and self._process.stdout
        print(data, file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline())
        server = FakeServer(said["pid"], f"http://127.0.0.1:{said['port']}")
        try:
            _wait(server)
            yield server
        finally:
            server.kill()


def _wait(server: FakeServer) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until and server.is_alive():
        try:
            if httpx2.get(f"{server.url}/health/ready", timeout=5).status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            time.sleep(0.01)
    raise RuntimeError(f"the server {server.pid} did not become ready")


@contextmanager
def forks(base: Path) -> Iterator[Forks]:
    """A process that forks servers; it and they are gone afterwards."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kit.fake_server", str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Forks(process)
        finally:
            process.kill()


def main() -> None:
    """Read data folders, fork servers."""
    from tests.server.world import ready_of

    base = Path(sys.argv[1])
    ready_of(base)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        port, pid = listener.getsockname()[1], os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # its parent's answers are not its own
            asyncio.run(_serve(base, Path(line.strip()), listener))
            os._exit(0)
        listener.close()
        print(json.dumps({"pid": pid, "port": port}), flush=True)


async def _serve(base: Path, data: Path, listener: socket.socket) -> None:
    import uvicorn

    from server.app import create_app
    from server.engine.fake import FakeEngineClient
    from tests.server.world import ready_of, settings_of

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    app = create_app(settings_of(base, data), base, FakeEngineClient(ready_of(base)))
    config = uvicorn.Config(app, log_config=None, access_log=False)
    await uvicorn.Server(config).serve([listener])


if __name__ == "__main__":
    main()
