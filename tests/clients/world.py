"""The server that clients are recorded against and that records are replayed against, over a scripted fake engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from server.engine.fake import FakeEngineClient
from server.engine.messages import Submit
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.tiny import EOS, NUM_BYTES
from tests.server.world import Site, ready_of

RECORDS = Path(__file__).parent / "records"
SCRIPTS = Path(__file__).parent / "scripts"
TASK = "intent"
SETTINGS: dict[str, Any] = {"tool_format": "hermes"}  # in which the server writes tools, as its base does not
MAX_TOKENS = 8192  # of a sequence, a byte each: some clients write long system prompts
QUOTED = re.compile("«([^»]*)»")


def record_of(client: str) -> dict[str, Any]:
    """Read what a client was recorded to send."""
    record: dict[str, Any] = json.loads((RECORDS / f"{client}.json").read_text())
    return record


def answer(submit: Submit) -> list[int]:
    """Say what stands in the last «quotes» of the prompt, or "card arrival" if it has none; without an end, again."""
    prompt = bytes(token for token in submit.prompt if token < NUM_BYTES).decode(errors="replace")
    found = QUOTED.findall(prompt)
    said = [*(found[-1] if found else "card arrival").encode()]
    return said * submit.sampling.max_tokens if submit.sampling.ignore_eos else [*said, EOS]


def engine_of(base: Path) -> FakeEngineClient:
    """Make the engine that gives the answers, with room for long prompts."""
    return FakeEngineClient(replace(ready_of(base), max_sequence_tokens=MAX_TOKENS), answer=answer)


async def add_task(site: Site, base: Path, folder: Path) -> None:
    """Upload the adapter that all clients ask for."""
    lora = make_lora(folder, base, r=2, target_modules=["q_proj"])
    answered = await site.upload(TASK, zip_folder(lora))
    assert answered.status_code == 201, answered.text
