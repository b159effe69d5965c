"""A crash loop over one upload: at every call of a kind the server dies, or its disk fails; then what must hold does.

`python -m tests.kit.crash` goes through all of them (minutes). Needs strace, a Debian package.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx2
from safetensors.torch import load_file, save

from adapters_store.format.archive import SAFETENSORS_TYPE, ZIP_TYPE
from adapters_store.format.folder import CONFIG, WEIGHTS, digest_of
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.fake_server import FakeServer, Forks, forks
from tests.kit.tiny import make_tiny_base

CALLS = ("fsync", "fdatasync", "rename", "renameat", "renameat2", "write", "pwrite64", "writev")  # strace counts each
ERRORS = ("EIO", "ENOSPC")
WITHIN_S = 60.0


def has_strace() -> bool:
    """Whether strace is here and may trace."""
    strace = shutil.which("strace")
    return strace is not None and subprocess.run([strace, "-qq", "true"], capture_output=True).returncode == 0


@contextmanager
def strace(pid: int, log: Path, *words: str) -> Iterator[None]:
    """Trace all threads of a process while the block runs."""
    command = ["strace", "-f", "-p", str(pid), "-o", str(log), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "attached" not in (line := process.stderr.readline()):
            assert line, "strace could not attach"
        yield
    finally:
        process.terminate()
        process.communicate()


@dataclass(frozen=True)
class Body:
    """What is uploaded, and the digest of the artifact that it is."""

    data: bytes
    content_type: str
    digest: str

    @classmethod
    def of_zip(cls, folder: Path) -> Body:
        """A folder as a zip."""
        data = zip_folder(folder)
        return cls(data, ZIP_TYPE, parts_of(data))

    @classmethod
    def of_file(cls, folder: Path) -> Body:
        """Its weights as one file that carries the config."""
        config = (folder / CONFIG).read_text()
        data = save(load_file(folder / WEIGHTS), {"adapter_config": config})
        return cls(data, SAFETENSORS_TYPE, digest_of({WEIGHTS: data, CONFIG: config.encode()}))


@dataclass(frozen=True)
class Loop:
    """A data folder with the task `old`, and an upload of the task `new` that is disturbed, each time over a copy."""

    forks: Forks
    root: Path
    old: Body
    new: Body

    def prepare(self) -> Loop:
        """Make the data folder that every round begins with."""
        with self.forks.serve(self.root / "data") as server:
            assert upload(server, "old", self.old) == 201
        return self

    def count(self, calls: str) -> int:
        """How many calls of a kind the thread that makes most of them makes in one upload."""
        with self._copy() as data, self.forks.serve(data) as server:
            with strace(server.pid, self.root / "log", "-e", f"trace={calls}"):
                assert upload(server, "new", self.new) == 201
            lines = (self.root / "log").read_text().splitlines()
        by_thread = Counter(line.split()[0] for line in lines if re.match(r"\d+\s+\w+\(", line))
        return max(by_thread.values(), default=0)

    def kill(self, calls: str, number: int) -> str:
        """Die at a call; a new server finds what was acknowledged, the rest absent or whole, the old as it was."""
        with self._copy() as data:
            with self.forks.serve(data) as server:
                inject = f"inject={calls}:signal=SIGKILL:when={number}"
                with strace(server.pid, self.root / "log", "-e", f"trace={calls}", "-e", inject):
                    status = upload(server, "new", self.new)
            with self.forks.serve(data) as server:
                assert artifact(server, "old") == self.old.digest, "the old version is not what it was"
                found = artifact(server, "new")
                assert found in (None, self.new.digest), "there is a part of an upload"
                assert status != 201 or found, "an acknowledged upload is lost"
                assert upload(server, "new", self.new) in (200, 201)
                assert not list((data / "artifacts" / "staging").glob("*")), "something is left in staging"
        return f"{calls} {number}: {'acknowledged' if status == 201 else 'whole' if found else 'absent'}"

    def fail(self, calls: str, error: str, number: int) -> str:
        """The disk refuses a call: 507 and nothing is kept; the next upload is taken, and the process is the same."""
        with self._copy() as data, self.forks.serve(data) as server:
            inject = f"inject={calls}:error={error}:when={number}"
            with strace(server.pid, self.root / "log", "-e", f"trace={calls}", "-e", inject):
                status = upload(server, "new", self.new)
            assert status == 507, f"{status} where {calls} {number} was {error}"
            assert artifact(server, "new") is None
            assert artifact(server, "old") == self.old.digest
            assert upload(server, "new", self.new) == 201 and server.is_alive()
        return f"{calls} {number} {error}: 507"

    @contextmanager
    def _copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            yield Path(shutil.copytree(self.root / "data", Path(folder) / "data"))


def upload(server: FakeServer, task: str, body: Body) -> int | None:
    """The status of an upload; None where the server died of it."""
    url, headers = f"{server.url}/adapters?task={task}", {"Content-Type": body.content_type}
    try:
        return httpx2.post(url, content=body.data, headers=headers, timeout=WITHIN_S).status_code
    except httpx2.TransportError:
        server.wait()
        return None


def artifact(server: FakeServer, task: str) -> str | None:
    """The digest of what a task's first version gives back; None where there is no such task."""
    answer = httpx2.get(f"{server.url}/tasks/{task}/versions/1/artifact", timeout=WITHIN_S)
    assert answer.status_code in (200, 404), answer.text
    return parts_of(answer.content) if answer.status_code == 200 else None


def parts_of(body: bytes) -> str:
    """The digest of a zipped artifact."""
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return digest_of({name: archive.read(name) for name in archive.namelist() if name != "README.md"})


@contextmanager
def crash_loop(base: Path, root: Path) -> Iterator[Loop]:
    """A loop that is ready to be gone through; its new artifact comes as a zip."""
    folders = [make_lora(root / f"hat-{n}", base, n, r=2, target_modules=["q_proj"]) for n in range(2)]
    with forks(base) as parent:
        yield Loop(parent, root, *map(Body.of_zip, folders)).prepare()


def rounds(loop: Loop, calls: str) -> Iterator[partial[str]]:
    """Every call of a kind, killed at and refused."""
    for number in range(1, loop.count(calls) + 1):
        yield partial(loop.kill, calls, number)
        yield from (partial(loop.fail, calls, error, number) for error in ERRORS)


def main() -> int:
    """Every call of every kind in the upload of a zip, and of one file where that differs; a line each."""
    if not has_strace():
        print("strace is not here (apt-get install strace), or may not trace: nothing was tried")
        return 1
    num_bad = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        crash_loop(make_tiny_base(Path(folder) / "base"), Path(folder)) as loop,
    ):
        of_file = replace(loop, new=Body.of_file(Path(folder) / "hat-1"))
        for one, calls in [*((loop, calls) for calls in CALLS), (of_file, "write")]:
            for attempt in rounds(one, calls):
                try:
                    print(attempt(), flush=True)
                except AssertionError as wrong:
                    num_bad += 1
                    print(f"{attempt.func.__name__} {attempt.args}: WRONG: {wrong}", flush=True)
    print(f"{num_bad} wrong")
    return num_bad > 0


if __name__ == "__main__":
    sys.exit(main())
