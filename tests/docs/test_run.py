"""The commands of README and docs/ do what the pages say: each test runs the blocks that name it, as a reader would.

What differs from the page is told by `Here`: where the server is, where the base is, and that a run is short.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.docs.pages import ROOT, Block, blocks
from tests.kit.server import MANYHATS, Server, free_port, serve

URL = "http://127.0.0.1:8000"
BIN = ".venv/bin/"
ASKS_A_SERVER = re.compile(rf"{BIN}manyhats (tasks|push|keys \w+) ")
KEY = "k" * 24
MAKEFILE = (ROOT / "Makefile").read_text()
BASE_NAME = "smollm2-135m"

pytestmark = pytest.mark.timeout(900)  # a first start compiles the kernels


@dataclass(frozen=True)
class Here:
    """Runs blocks in a folder. `url` is the server's; `flags` end every command that trains."""

    folder: Path
    url: str = URL
    flags: str = ""

    def text(self, block: Block) -> str:
        """The block with our server, our programs and short runs."""
        lines = block.text.replace("\\\n", " ").splitlines()
        return "\n".join(self._line(line) for line in lines)

    def _line(self, line: str) -> str:
        if ASKS_A_SERVER.match(line) and "--url" not in line:
            line += f" --url {self.url}"
        if re.match(rf"{BIN}manyhats (train|compare) ", line):
            for name in re.findall("--[a-z-]+", self.flags):  # an option is given once
                line = re.sub(rf" {name} \S+", "", line)
            line += f" {self.flags}"
        return line.replace(URL, self.url).replace(BIN, f"{MANYHATS.parent}/")

    def run(self, block: Block, **environment: str) -> str:
        """What the block prints. It fails as a script of bash does, and if a request is refused."""
        (self.folder / ".curlrc").write_text("fail-with-body\n")
        env = {**os.environ, "CURL_HOME": str(self.folder), "NO_COLOR": "1", "COLUMNS": "300", **environment}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", self.text(block)],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{block.place}: {done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the paths of the pages are there, and what is written does not touch the repository."""
    (tmp_path / "adapters_store").symlink_to(ROOT / "adapters_store")
    return tmp_path


def answers(said: str) -> list[dict[str, object]]:
    """The JSON objects that stand in an output one after another; lines of streams are left out."""
    decoder, found, rest = json.JSONDecoder(), [], re.sub(r"(^|(?<=\}))data: .*$", "", said, flags=re.MULTILINE).strip()
    while rest:
        one, end = decoder.raw_decode(rest)
        found.append(one)
        rest = rest[end:].strip()
    return found


# A server with the examples


@pytest.mark.real_base
def test_requests_of_the_pages(marked: list[Block], examples: Server, clone: Path) -> None:
    """Every request of the pages to a server with the examples is answered, plain or as a stream."""
    here = Here(clone, examples.url)
    said = {block: here.run(block) for block in marked}
    first = next(text for block, text in said.items() if block.page == "README.md")
    plain = answers(first)
    assert [one["task"] for one in plain] == ["banking77", "sentiment", "restaurants"]
    assert first.count("data: {") > 1 and first.rstrip().endswith("data: [DONE]")
    assert (clone / "banking77.zip").read_bytes().startswith(b"PK")
    assert all(answers(text) for text in said.values())


@pytest.mark.real_base
def test_a_peft_folder_becomes_an_answer(marked: list[Block], examples: Server, tmp_path: Path) -> None:
    """In the folder of a PEFT adapter the block of README uploads it, and its task answers."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ROOT / "adapters_store/examples/banking77" / name, tmp_path)
    for block in marked:
        upload, answer = answers(Here(tmp_path, examples.url).run(block))
        assert upload["task"] == answer["task"] == "mine" and upload["version"] == 1 and upload["checks"]


@pytest.mark.real_base
def test_the_openai_client(marked: list[Block], examples: Server) -> None:
    """The block of README with OpenAI's own client is answered by the task that it names."""
    for block in marked:
        text = block.text.replace(URL, examples.url).replace("client.chat", "answer = client.chat")
        names: dict[str, object] = {}
        exec(compile(text, block.place, "exec"), names)  # noqa: S102 - it is the page's own
        answer = names["answer"]
        assert answer.model == "banking77" and answer.choices[0].message.content  # type: ignore[attr-defined]
        names["client"].close()  # type: ignore[attr-defined]


@pytest.mark.real_base
def test_commands_for_a_running_server(marked: list[Block], examples: Server, clone: Path) -> None:
    """`manyhats tasks` shows a task of a running server, and `manyhats push` uploads a PEFT folder to it."""
    here = Here(clone, examples.url)
    said = "".join(here.run(block) for block in marked)
    assert "banking77" in said and "lora" in said
    assert httpx2.get(f"{examples.url}/tasks/my-task").json()["versions"][0]["method"] == "lora"


# Tenants


def test_tenants_and_their_keys(
    marked: list[Block], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the admin key the blocks make a tenant with limits and a key, with which that tenant may ask."""
    monkeypatch.setenv("MANYHATS_ADMIN_KEY", KEY)
    with serve(tiny_base, tmp_path / "data", num_threads=1, kv_cache_bytes="16MiB") as server:
        for block in marked:
            said = Here(tmp_path, server.url).run(block, MANYHATS_ADMIN_KEY=KEY)
            (key,) = re.findall(r"mh_\S+", said)
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": "Hello", "max_tokens": 1}
            assert httpx2.post(f"{server.url}/generate?task=base", json=body, headers=headers).status_code == 200
            assert httpx2.get(f"{server.url}/tenants", headers=headers).status_code == 403


# Serving


def test_serving_commands(marked: list[Block], tiny_base: Path, clone: Path) -> None:
    """Each command that serves becomes ready, and ends at SIGTERM; the first one is the recipe of `make serve`."""
    recipe = MAKEFILE.replace("$(BIN)", ".venv/bin").replace("$(DATA)", "var").partition("\nserve:")[2]
    assert marked[0].text in [line.strip() for line in recipe.partition("\n\n")[0].splitlines()]
    for block in marked:
        port = free_port()
        more = f" --base {tiny_base} --port {port} --data {clone / str(port)} --num-threads 1 --kv-cache-bytes 16MiB"
        text = re.sub(rf"({re.escape(str(MANYHATS))} serve.*)", rf"exec \1{more}", Here(clone).text(block))
        process = subprocess.Popen(["bash", "-e", "-c", text], cwd=clone, stderr=subprocess.DEVNULL)
        try:
            assert _is_ready(f"http://127.0.0.1:{port}/health/ready", process), block.place
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def _is_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx2.get(url, timeout=5).status_code == httpx2.codes.OK:
                return True
        except httpx2.TransportError:
            time.sleep(0.1)
    return False


# Training


def test_training_commands(marked: list[Block], tiny_base: Path, clone: Path) -> None:
    """Each command that trains writes an artifact with a manifest; here it takes two steps of a tiny base."""
    for number, block in enumerate(marked):
        out = clone / f"out-{number}"
        Here(clone, flags=f"--base {tiny_base} --eval {_few(clone)} --steps 2 --out {out}").run(block)
        manifest = _manifest(out)
        assert manifest["method"] == "lora" and manifest["prompt_format"]["user"]["before"] == "Customer: "


def test_comparing_methods(marked: list[Block], tiny_base: Path, clone: Path) -> None:
    """`manyhats compare` writes its table, its figures and its plot; here of one method and a tiny base."""
    flags = f"--methods lora --base {tiny_base} --eval {_few(clone)} --steps 1"
    for block in marked:
        Here(clone, flags=flags).run(block)
    names = {path.name for path in (clone / "var/compare").iterdir()}
    assert names >= {"compare.md", "compare.json", "compare.png", "lora"}


def test_a_file_of_jobs(marked: list[Block], tiny_base: Path, clone: Path) -> None:
    """The file of jobs that the page shows trains both its jobs; here on few rows of a tiny base."""
    (jobs,) = [block for block in blocks() if block.kind == "file"]
    (clone / jobs.said).write_text(jobs.text.replace(BASE_NAME, str(tiny_base)))
    rows = [("red", "warm"), ("blue", "cold"), ("orange", "warm"), ("green", "cold")] * 3
    lines = [json.dumps({"prompt": f"{prompt} {i}", "completion": mood}) for i, (prompt, mood) in enumerate(rows)]
    (clone / "intents.jsonl").write_text("\n".join(lines) + "\n")
    cells = [f"{prompt} {i},{mood}" for i, (prompt, mood) in enumerate(rows)]
    (clone / "mood.csv").write_text("\n".join(["prompt,completion", *cells]) + "\n")
    for block in marked:
        Here(clone).run(block)
    assert _manifest(clone / "runs/intents")["method"] == "lora"
    assert _manifest(clone / "runs/mood")["method"] == "bottleneck"


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def _few(folder: Path) -> Path:
    """A few rows of the example's test set: a tiny base needs no more to be scored."""
    file = folder / "few.csv"
    lines = (ROOT / "adapters_store/examples/data/banking77/test.csv").read_text().splitlines()[:5]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_programs_are_those_of_this_environment() -> None:
    """The command that the blocks run lies beside this Python, where the pages have `.venv/bin`."""
    assert MANYHATS.parent == Path(sys.executable).parent and MANYHATS.is_file()
