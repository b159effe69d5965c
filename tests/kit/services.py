"""Services that others run beside the server, real ones: a bucket that speaks S3, and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psycopg
import pytest

from tests.kit.server import free_port, stop, wait_for

WITHIN_S = 60
KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3(scratch: Path, bucket: str) -> Iterator[dict[str, str]]:
    """moto's HTTP server with one empty bucket; the environment in which `s3://` means it."""
    port, log = free_port(), scratch / "moto.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f"{url}/moto-api/", process, log, time.monotonic() + WITHIN_S)
        httpx2.put(f"{url}/{bucket}").raise_for_status()
        yield {**KEYS, "AWS_ENDPOINT_URL": url}
    finally:
        stop(process)


def _program(name: str) -> str:
    """A program of PostgreSQL's; Debian keeps them out of the path. Skips the test where there is none."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[::-1]), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql): the registry was tried on SQLite alone")
    return found


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL server of the test's own on a free loopback port; the URL of its empty database."""
    initdb, server, port = _program("initdb"), _program("postgres"), free_port()
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    folder = Path(tempfile.mkdtemp(prefix="manyhats-postgres-", dir="/tmp"))
    data, log = folder / "data", folder / "log"
    if user:
        shutil.chown(folder, user)
    flags = ("-c", "fsync=off", "-c", "unix_socket_directories=", "-c", "listen_addresses=127.0.0.1", "-p", str(port))
    try:
        words = (initdb, "-D", data, "-U", "manyhats", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C")
        subprocess.run(words, check=True, capture_output=True, user=user, cwd=folder)
        with log.open("wb") as out:
            command: list[str | Path] = [server, "-D", data, *flags]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, user=user, cwd=folder)
        try:
            url = f"postgresql://manyhats@127.0.0.1:{port}/postgres"
            _wait(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for its clients
            process.wait(WITHIN_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WITHIN_S
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL does not come up:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.05)
        else:
            return
