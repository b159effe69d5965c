"""The whole front over an engine that is faked: every room real but the engine, reached in memory or over loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.base.describe import describe
from adapters_store.base.identity import base_identity
from server.app import create_app
from server.engine.client import EngineClient
from server.engine.engine_process import Patience
from server.engine.fake import FakeEngineClient, fake_ready
from server.engine.messages import Ready
from server.engine.process_client import ProcessEngineClient
from server.listen import bind
from server.settings import Settings
from server.state import ServerState
from tests.kit.tiny import EOS
from tests.server.documented import DocumentedAnswers

MAX_TOKENS = 400  # of a sequence
REAL_LIMITS: dict[str, Any] = {
    "precision": "fp32",
    "kv_cache_bytes": 8 * 2**20,
    "num_threads": 1,
    "max_running": 8,
    "max_waiting": 12,
    "max_sequence_tokens": 600,
}
ZIP, SAFETENSORS = "application/zip", "application/x-safetensors"


@lru_cache
def ready_of(base: Path) -> Ready:
    """The description that the real engine gives of a base of the kit."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return fake_ready(
        spec=describe(model, "tiny", base_identity(base).identity, base),
        eos_token_ids=[EOS],
        max_sequence_tokens=MAX_TOKENS,
    )


@dataclass
class Site:
    """A server that is up, and a way to ask it."""

    app: FastAPI
    client: EngineClient
    data: Path
    http: httpx2.AsyncClient

    @property
    def engine(self) -> FakeEngineClient:
        """The engine of a test that has a fake one."""
        assert isinstance(self.client, FakeEngineClient)
        return self.client

    @property
    def process(self) -> ProcessEngineClient:
        """The engine of a test that has a real one."""
        assert isinstance(self.client, ProcessEngineClient)
        return self.client

    @property
    def state(self) -> ServerState:
        """The rooms of the server."""
        state: ServerState = self.app.state.server
        return state

    async def post(self, path: str, body: object) -> httpx2.Response:
        """POST a body as JSON; bytes and text go as they are."""
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        return await self.http.post(path, content=content)

    async def ask(self, task: str = "base", **body: object) -> dict[str, Any]:
        """The answer of POST /generate, which must be 200."""
        answer = await self.post(f"/generate?task={task}", body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def events(self, path: str = "/generate?task=base", **body: object) -> list[dict[str, Any]]:
        """The events of a stream that ends with [DONE]."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        *events, done = sent(answer.text)
        assert done == ("message", "[DONE]"), done
        return [json.loads(data) for _, data in events]

    async def upload(self, task: str, body: bytes, kind: str = ZIP, **params: object) -> httpx2.Response:
        """Upload a body by POST /adapters."""
        query = {"task": task, **{name: str(value) for name, value in params.items()}}
        return await self.http.post("/adapters", params=query, content=body, headers={"Content-Type": kind})

    def staged(self) -> list[Path]:
        """The files that lie in the staging area."""
        staging = self.data / "artifacts" / "staging"
        return list(staging.iterdir()) if staging.exists() else []

    def stored(self) -> set[str]:
        """Digests on the disk; nothing may be staged between uploads."""
        assert not self.staged()
        return self.state.stores.blobs.digests()


def sent(text: str) -> list[tuple[str, str]]:
    """(event, data) of server-sent events."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), fields["data"]))
    return found


def settings_of(base: Path, data: Path, **settings: Any) -> Settings:
    """Settings of a test's server."""
    return Settings(base=str(base), data=data, **settings)


def checked_app(base: Path, data: Path, engine: EngineClient, **settings: Any) -> tuple[FastAPI, list[str]]:
    """The application, and the faults that will be found in its answers: all are held against its own document."""
    app, faults = create_app(settings_of(base, data, **settings), base, engine), list[str]()
    app.add_middleware(DocumentedAnswers, faults=faults)
    return app, faults


@asynccontextmanager
async def open_site(base: Path, data: Path, engine: EngineClient | None = None, **settings: Any) -> AsyncIterator[Site]:
    """A server in memory: requests go straight into the application."""
    fake = engine or FakeEngineClient(ready_of(base))
    app, faults = checked_app(base, data, fake, **settings)
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield Site(app, fake, data, http)
    assert not faults, faults[:3]


@asynccontextmanager
async def serve_site(
    base: Path,
    data: Path,
    engine: EngineClient | None = None,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **settings: Any,
) -> AsyncIterator[Site]:
    """A server that listens on loopback, as `manyhats serve` makes it, in this loop; `around` may wrap it."""
    fake = engine or FakeEngineClient(ready_of(base))
    app, faults = checked_app(base, data, fake, **settings)
    (listener,) = bind("127.0.0.1", 0)
    with listener:
        config = uvicorn.Config(
            around(app), log_config=None, access_log=False, timeout_graceful_shutdown=5, timeout_keep_alive=120
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started:
                assert not running.done(), app.state.start_failure
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
                yield Site(app, fake, data, http)
        finally:
            server.should_exit = True
            await running
    assert not faults, faults[:3]


@asynccontextmanager
async def serve_real(base: Path, data: Path, **settings: Any) -> AsyncIterator[Site]:
    """A server that listens on loopback, over the real engine in a process of its own."""
    limits = {**REAL_LIMITS, **settings}
    config = settings_of(base, data, **limits).engine_config(base)
    client = ProcessEngineClient(config, patience=Patience(first_retry=0.05, max_retry=0.5))
    async with serve_site(base, data, client, **limits) as site:
        yield site


async def until(what: Any, seconds: float = 30.0) -> None:
    """Wait until `what()` is true."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.005)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error of an answer, which must have the contract's form, or that of LoRAX and TGI, and nothing else."""
    body: dict[str, Any] = answer.json()
    if isinstance(body["error"], str):
        error = {"message": body.pop("error"), **body}
        error.pop("error_type", None)
    else:
        assert set(body) == {"error"}
        error = body["error"]
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    return error
