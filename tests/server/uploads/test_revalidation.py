"""The same checks on every door, and for what is in the store at start and was proved under another base, or never."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, digest_of, read_files
from adapters_store.registry.registry import Facts
from server.core import EngineFailure
from server.engine.client import require_ready
from server.engine.fake import FakeEngineClient
from server.uploads import validation
from server.uploads.preload import TreeImport
from tests.kit.adapters import zip_folder
from tests.server.uploads.test_validation import echoed, with_parity
from tests.server.world import Site, error_of, open_site, ready_of, serve_site, until
from training.errors import PushError
from training.push import Target, push_folder

pytestmark = pytest.mark.anyio
Spoil = Callable[[Site, Path], object]


@asynccontextmanager
async def opened(base: Path, data: Path, **settings: Any) -> AsyncIterator[Site]:
    """A server, once it has validated all that it found in its store."""
    async with open_site(base, data, **settings) as site:
        await until(lambda: not site.state.revalidation.num_pending)
        yield site


def quarantined(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The reasons in the log, a line each."""
    found = [record for record in caplog.records if record.message == "a stored adapter was quarantined"]
    return [vars(record)["reason"] for record in found]


async def test_what_was_proved_here_is_not_proved_again(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start under the same base and software validates nothing again; under another everything, once."""
    async with opened(tiny_base, tmp_path) as site:
        for number, body in enumerate(zips):
            await site.upload(f"t{number}", body)
    for checks, num_probed in ((validation.CHECKS, 0), (validation.CHECKS + 1, 3), (validation.CHECKS + 1, 0)):
        monkeypatch.setattr(validation, "CHECKS", checks)
        async with opened(tiny_base, tmp_path) as site:
            assert (
                len(site.engine.probed) == num_probed * validation.NUM_PROBES
                and not site.state.revalidation.num_pending
            )
            assert (await site.ask("t0", prompt="a"))["adapter"]["version"] == 1


async def test_another_base_is_another_ground(tiny_base: Path, tmp_path: Path) -> None:
    """A validation holds for a base's files as they lie there, and for how it is computed."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    grounds = [
        validation.compute_validation_fingerprint(base, "fp32", "cpu"),
        validation.compute_validation_fingerprint(base, "int8", "cpu"),
    ]
    grounds.append(validation.compute_validation_fingerprint(base, "fp32", "cuda"))
    grounds.append(validation.compute_validation_fingerprint(base, "fp32", "cpu", "longrope over 4096 tokens"))
    (base / "model.safetensors").touch()
    grounds.append(validation.compute_validation_fingerprint(base, "fp32", "cpu"))
    assert len(set(grounds)) == 5 and grounds[-1] == validation.compute_validation_fingerprint(base, "fp32", "cpu")


async def test_what_fails_under_the_new_base_is_quarantined(
    anyio_backend: str,
    tiny_base: Path,
    tmp_path: Path,
    loras: list[Path],
    zips: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An adapter stored under int8 that is off its parity under fp32 is one line in the log, and 503 with the reason.

    Others are served as before. It stays in the store: under int8 it is served again; uploaded anew it is refused.
    """
    coarse = FakeEngineClient(ready_of(tiny_base))
    coarse._description = type(ready_of(tiny_base))(**{**fields_of(ready_of(tiny_base)), "precision": "int8"})
    async with opened(tiny_base, tmp_path / "data", engine=coarse, precision="int8") as site:
        body = with_parity(site, loras[0], tmp_path / "off", [echoed(5, 1.0)])
        assert (await site.upload("off", body)).status_code == 201
        assert (await site.upload("good", zips[1])).status_code == 201
    async with opened(tiny_base, tmp_path / "data", precision="fp32") as site:
        assert "0.02 is allowed at fp32" in quarantined(caplog)[0] and len(quarantined(caplog)) == 1
        for _ in range(2):
            answer = await site.post("/generate?task=off", {"prompt": "a"})
            assert (answer.status_code, error_of(answer)["code"]) == (503, "adapter_failed")
            assert "0.02 is allowed" in error_of(answer)["message"]
        assert (await site.http.get("/tasks/off")).json()["versions"][0]["residency"] == "quarantined"
        assert (await site.ask("good", prompt="a"))["adapter"]["version"] == 1
        assert (await site.upload("off", body)).status_code == 422
    async with opened(tiny_base, tmp_path / "data", engine=coarse, precision="int8") as site:
        assert (await site.ask("off", prompt="a"))["adapter"]["version"] == 1


def fields_of(thing: Any) -> dict[str, Any]:
    """The fields of a message, by name."""
    return {name: getattr(thing, name) for name in thing.__struct_fields__}


async def test_a_herd_waits_for_one_proof(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """Requests for an adapter that is not validated yet wait for one validation, also if the first of them gives up."""
    async with opened(tiny_base, tmp_path) as site:
        digest = (await site.upload("t", zips[0])).json()["digest"]
        site.state.revalidation.mark_unvalidated(digest)
        site.engine.probed.clear()
        site.engine.are_probes_stuck = True
        first = asyncio.create_task(site.post("/generate?task=t", {"prompt": "a"}))
        await until(lambda: len(site.engine.probed) == validation.NUM_PROBES)
        herd = [asyncio.create_task(site.ask("t", prompt="a")) for _ in range(5)]
        first.cancel()
        site.engine.are_probes_stuck = False
        assert {answer["adapter"]["digest"] for answer in await asyncio.gather(*herd)} == {digest}
        assert len(site.engine.probed) == 2 * validation.NUM_PROBES and not site.state.revalidation.num_pending


async def test_an_engine_that_is_busy_decides_nothing(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is 503 with Retry-After if the engine has no time to validate its adapter; the next may be served."""
    async with opened(tiny_base, tmp_path) as site:
        digest = (await site.upload("t", zips[0])).json()["digest"]
        site.state.revalidation.mark_unvalidated(digest)
        monkeypatch.setattr(validation, "PROBE_WITHIN_S", 0.05)
        site.engine.are_probes_stuck = True
        answer = await site.post("/generate?task=t", {"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"], error_of(answer)["code"]) == (503, "1", "overloaded")
        site.engine.are_probes_stuck = False
        assert (await site.ask("t", prompt="a"))["adapter"]["digest"] == digest


async def test_what_the_store_lost(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that somebody took out is one line at start and 503; the same upload again heals it, at once."""
    async with opened(tiny_base, tmp_path) as site:
        digest = (await site.upload("lost", zips[0])).json()["digest"]
        await site.upload("kept", zips[1])
        path = site.state.stores.blobs.path(digest)
    shutil.rmtree(path)
    async with opened(tiny_base, tmp_path) as site:
        assert quarantined(caplog) == [f"no artifact {digest[:12]} in the store"]
        answer = await site.post("/generate?task=lost", {"prompt": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (503, "adapter_failed")
        assert (await site.ask("kept", prompt="a"))["adapter"]["version"] == 1
        assert (await site.upload("lost", zips[0])).status_code == 200
        assert (await site.ask("lost", prompt="a"))["adapter"]["digest"] == digest


async def test_what_nobody_uploaded(anyio_backend: str, tiny_base: Path, tmp_path: Path, loras: list[Path]) -> None:
    """A folder that was laid into the store by hand is no task's, is never served, and goes at the next start."""
    async with opened(tiny_base, tmp_path) as site:
        digest = digest_of(read_files(loras[0]))
        shutil.copytree(loras[0], site.state.stores.blobs.path(digest))
    async with opened(tiny_base, tmp_path) as site:
        assert site.stored() == set() and len((await site.http.get("/tasks")).json()["tasks"]) == 1
        assert not site.engine.probed


def _edit(folder: Path, **config: Any) -> None:
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | config))


def _retensor(folder: Path, change: Callable[[dict[str, torch.Tensor], str], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, min(tensors))
    save_file(tensors, folder / WEIGHTS)


def _manifest(folder: Path, identity: str, parity: list[dict[str, Any]] | None = None) -> None:
    base = {"name": "tiny", "identity": identity, "weights": "b" * 64}
    said = {"format_version": 1, "method": "lora", "base": base, "parity": parity or []}
    (folder / MANIFEST).write_text(json.dumps(said))


BAD: dict[str, Spoil] = {
    "cut short": lambda _site, folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3]),
    "not finite": lambda _site, folder: _retensor(folder, lambda tensors, name: tensors[name].fill_(float("nan"))),
    "another shape": lambda _site, folder: _retensor(
        folder, lambda tensors, name: tensors.update({name: torch.ones(3, 3)})
    ),
    "a tensor without its twin": lambda _site, folder: _retensor(folder, lambda tensors, name: tensors.pop(name)),
    "an unknown key": lambda _site, folder: _edit(folder, use_surprise=True),
    "another base": lambda _site, folder: _manifest(folder, "a" * 64),
    "a probe that fails": lambda site, _folder: setattr(
        site.engine, "probe_failure", EngineFailure("nonfinite_logits", "no numbers")
    ),
    "another answer than its trainer's": lambda site, folder: _manifest(
        folder, require_ready(site.state.client).spec.identity, [echoed(5, 1.0)]
    ),
}


@pytest.mark.parametrize("bad", BAD)
async def test_every_door_has_the_same_checks(
    anyio_backend: str,
    tiny_base: Path,
    tmp_path: Path,
    loras: list[Path],
    caplog: pytest.LogCaptureFixture,
    bad: str,
) -> None:
    """Upload, import, push and what is in the store at start: each refuses it in the same words, and none serves it."""
    folder = Path(shutil.copytree(loras[0], tmp_path / "tree" / "bad"))
    async with serve_site(tiny_base, tmp_path / "data") as site:
        BAD[bad](site, folder)
        said = error_of(await site.upload("a", zip_folder(folder)))["message"]
        await TreeImport(site.state.uploads, site.state.metrics).begin(tmp_path / "tree")
        imported = [record.reason for record in caplog.records if record.message == "an adapter was not taken in"]  # type: ignore[attr-defined]
        assert imported == [said]
        with pytest.raises(PushError) as pushed:
            await asyncio.to_thread(push_folder, Target(str(site.http.base_url), "a"), folder)
        assert said in str(pushed.value)
        assert site.stored() == set() and len((await site.http.get("/tasks")).json()["tasks"]) == 1
        digest = digest_of(read_files(folder))
        shutil.copytree(folder, site.state.stores.blobs.path(digest))
        facts = Facts(
            digest=digest,
            method="lora",
            num_parameters=1,
            num_items=1,
            num_matrix_items=1,
            num_virtual=1,
            num_bytes=1,
        )
        site.state.stores.registry.add_version("default", "a", facts)
    engine = FakeEngineClient(ready_of(tiny_base))
    engine.probe_failure = site.engine.probe_failure
    async with opened(tiny_base, tmp_path / "data", engine=engine) as site:
        (reason,) = quarantined(caplog)
        assert said in reason
        answer = await site.post("/generate?task=a", {"prompt": "a"})
        assert answer.status_code == 503 and said in error_of(answer)["message"]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
