"""POST /adapters: taken in whole and durable, or refused by name with nothing kept."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from adapters_store.base.identity import base_identity
from adapters_store.format.archive import CONTENT_TYPES
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, read_files, read_folder
from server.engine.client import require_ready
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.families.prompts import make_multitask
from tests.kit.forge import tar_of
from tests.server.world import SAFETENSORS, ZIP, Site, error_of, open_site

pytestmark = pytest.mark.anyio
Change = Callable[[Path], object]


async def test_upload(site: Site, zips: list[bytes], loras: list[Path]) -> None:
    """A zip of a PEFT folder is 201 with the contract's fields, and the task answers with it at once."""
    answer = await site.upload("hat", zips[0], note="first")
    artifact = read_folder(loras[0])
    assert answer.status_code == 201
    body = answer.json()
    sizes = {"num_parameters", "bytes", "slot_bytes", "virtual_tokens"}
    assert set(body) == {"task", "version", "digest", "method", "checks", *sizes}
    assert (body["task"], body["version"], body["method"]) == ("hat", 1, "lora")
    assert (body["digest"], body["bytes"]) == (artifact.digest, artifact.num_bytes)
    assert body["num_parameters"] == sum(tensor.numel() for tensor in artifact.tensors.values())
    names = ["ignored", "form", "finite", "method", "base", "shapes", "ends", "applied", "probe"]  # PEFT's README.md
    assert [check["name"] for check in body["checks"]] == names
    assert all(check["ok"] for check in body["checks"])
    assert site.stored() == {artifact.digest}
    assert (await site.ask("hat", prompt="a"))["adapter"]["digest"] == artifact.digest
    assert (await site.http.get("/tasks/hat")).json()["versions"][0]["note"] == "first"


def without_checks(answer: httpx2.Response) -> dict[str, Any]:
    """What an upload's answer says of the version."""
    return {name: value for name, value in answer.json().items() if name != "checks"}


async def test_same_bytes_again(site: Site, zips: list[bytes]) -> None:
    """The same bytes again are 200 and the same version, however they are packed; for another task they are its own."""
    first = without_checks(await site.upload("a", zips[0]))
    with zipfile.ZipFile(io.BytesIO(zips[0])) as archive:
        again = io.BytesIO()
        with zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as other:
            for name in reversed(archive.namelist()):
                other.writestr(f"folder/{name}", archive.read(name))
    for body in (zips[0], again.getvalue()):
        answer = await site.upload("a", body)
        assert (answer.status_code, without_checks(answer)) == (200, first)
    answer = await site.upload("b", zips[0])
    assert (answer.status_code, answer.json()["version"], answer.json()["digest"]) == (201, 1, first["digest"])
    assert site.stored() == {first["digest"]}


async def test_versions(site: Site, zips: list[bytes]) -> None:
    """A second version answers from then on; with activate=false it stands by; the first, uploaded again, returns."""
    first, second, third = [
        (await site.upload("a", body, **params)).json()
        for body, params in zip(zips, ({}, {}, {"activate": "false"}), strict=True)
    ]
    assert [version["version"] for version in (first, second, third)] == [1, 2, 3]
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 2
    assert (await site.ask("a", prompt="x", version=3))["adapter"]["digest"] == third["digest"]
    assert (await site.upload("a", zips[0])).status_code == 200
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 1


async def test_one_safetensors_file(site: Site, loras: list[Path]) -> None:
    """A safetensors file that carries its config in its metadata is an artifact; without the config it is 422."""
    weights = (loras[0] / WEIGHTS).read_bytes()
    said = {"adapter_config": (loras[0] / CONFIG).read_text()}
    answer = await site.upload("a", save(load_file(loras[0] / WEIGHTS), said), SAFETENSORS)
    assert answer.status_code == 201
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 1
    answer = await site.upload("b", weights, SAFETENSORS)
    assert (answer.status_code, error_of(answer)["param"]) == (422, "adapter_config")


async def test_uploads_at_once(site: Site, zips: list[bytes]) -> None:
    """Uploads at the same time, of equal and of other bytes, make one version a digest and one artifact a digest."""
    answers = await asyncio.gather(*(site.upload(task, body) for task in "ab" for body in zips * 2))
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [201] * 6
    for task in "ab":
        versions = (await site.http.get(f"/tasks/{task}")).json()["versions"]
        assert sorted(version["version"] for version in versions) == [1, 2, 3]
    assert len(site.stored()) == 3


async def test_restart(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A restart keeps every acknowledged upload; it drops staged files and artifacts that belong to no version."""
    async with open_site(tiny_base, tmp_path) as site:
        kept = (await site.upload("a", zips[0])).json()["digest"]
        await site.ask("a", prompt="x")
        with site.state.stores.blobs.staging() as staging:
            shutil.copytree(site.state.stores.blobs.path(kept), staging / "f")
            site.state.stores.blobs.put(staging / "f", "f" * 64)
        (site.data / "artifacts" / "staging" / "left").mkdir()
    async with open_site(tiny_base, tmp_path) as site:
        assert site.stored() == {kept}
        assert (await site.ask("a", prompt="x"))["adapter"]["digest"] == kept
        version = (await site.http.get("/tasks/a")).json()["versions"][0]
        assert version["use"] == {"requests": 2, "prompt_tokens": 2, "completion_tokens": 4}


def edited(folder: Path, into: Path, change: Change) -> bytes:
    """A zip of a changed copy."""
    shutil.copytree(folder, into)
    change(into)
    return zip_folder(into)


def tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Change:
    """Change the tensors of a folder; the name of one of them is given."""

    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found, sorted(found)[0])
        save_file(found, folder / WEIGHTS)

    return apply


def config(**values: Any) -> Change:
    """Change the config of a folder."""

    def apply(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def member(name: str, data: bytes) -> Change:
    """Add a file to a folder."""
    return lambda folder: (folder / name).write_bytes(data)


def other_base(folder: Path) -> None:
    """Say in a manifest that the adapter was trained on another base."""
    base = {"name": "other", "identity": "a" * 64, "weights": "b" * 64}
    (folder / MANIFEST).write_text(json.dumps({"format_version": 1, "method": "lora", "base": base}))


def set_nan(found: dict[str, torch.Tensor], name: str) -> None:
    found[name][1, 1] = float("nan")


def cut(found: dict[str, torch.Tensor], name: str) -> None:
    found[name] = found[name][:, :-1].contiguous()


def drop(found: dict[str, torch.Tensor], name: str) -> None:
    del found[name]


def stray(found: dict[str, torch.Tensor], name: str) -> None:
    found["base_model.model.nowhere.lora_A.weight"] = found[name].clone()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_FOLDERS: dict[str, tuple[Change, int, str, str]] = {
    "NaN": (tensors(set_nan), 422, "artifact_invalid", FIRST),
    "wrong shape": (tensors(cut), 422, "artifact_invalid", FIRST),
    "missing tensor": (tensors(drop), 422, "artifact_invalid", FIRST),
    "tensor without a site": (tensors(stray), 422, "artifact_invalid", "nowhere"),
    "unknown method": (config(peft_type="MAGIC"), 422, "method_unsupported", "MAGIC"),
    "unknown key": (config(use_qalora=True), 422, "method_unsupported", "use_qalora"),
    "wrong base": (other_base, 422, "wrong_base", "other"),
    "config is no JSON": (member(CONFIG, b"{"), 422, "artifact_invalid", CONFIG),
    "weights are no safetensors": (member(WEIGHTS, b"\x05" + bytes(99)), 422, "artifact_invalid", ""),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), 422, "artifact_invalid", WEIGHTS),
    "no config": (lambda folder: (folder / CONFIG).unlink(), 422, "artifact_invalid", CONFIG),
    "pickle": (pickled, 415, "artifact_type", "adapter_model.bin"),
    "pickle by another name": (member(WEIGHTS, pickle.dumps({})), 415, "artifact_type", WEIGHTS),
}


async def refused(site: Site, body: bytes, kind: str = ZIP, task: str = "bad") -> tuple[int, dict[str, Any]]:
    """Upload what must be refused. Nothing of it may be kept, and the neighbours' tokens are what they were."""
    stored, before = site.stored(), (await site.ask("good", prompt="neighbour"))["choices"]
    answer = await site.upload(task, body, kind)
    error = error_of(answer)
    assert site.stored() == stored
    assert (await site.http.get(f"/tasks/{task}")).status_code == 404
    assert (await site.ask("good", prompt="neighbour"))["choices"] == before
    assert (await site.http.get("/health/ready")).status_code == 200
    return answer.status_code, error


@pytest.fixture
async def good(site: Site, zips: list[bytes]) -> Site:
    """A server with one good task."""
    assert (await site.upload("good", zips[2])).status_code == 201
    return site


@pytest.mark.parametrize("name", BAD_FOLDERS)
async def test_bad_folders(good: Site, loras: list[Path], tmp_path: Path, name: str) -> None:
    """A folder that is no sound artifact of this base is refused by its status and the name of what is wrong."""
    change, status, code, names = BAD_FOLDERS[name]
    got, error = await refused(good, edited(loras[0], tmp_path / "bad", change))
    assert (got, error["code"]) == (status, code), error
    assert names in error["message"]


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return body.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    """The head of a symbolic link."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


BAD_ZIPS = {
    "no zip": (b"nothing", 422, "artifact_invalid"),
    "empty": (b"", 422, "artifact_invalid"),
    "empty zip": (zip_of(), 422, "artifact_invalid"),
    "out of the folder": (zip_of(("../adapter_config.json", b"{}")), 422, "artifact_invalid"),
    "absolute": (zip_of(("/etc/adapter_config.json", b"{}")), 422, "artifact_invalid"),
    "link": (zip_of((link("adapter_config.json"), b"/etc/passwd")), 422, "artifact_invalid"),
    "bomb": (zip_of((WEIGHTS, bytes(2**26)), compression=zipfile.ZIP_DEFLATED), 413, "artifact_too_large"),
    "many members": (zip_of(*((str(n), b"") for n in range(30_000))), 413, "artifact_too_large"),
    "pickle": (pickle.dumps([1]), 415, "artifact_type"),
    "torch.save": (zip_of(("archive/data.pkl", b"")), 415, "artifact_type"),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
async def test_bad_zips(good: Site, name: str) -> None:
    """A body that is no sound zip, points out of itself or is a bomb is refused by its status."""
    body, status, code = BAD_ZIPS[name]
    got, error = await refused(good, body)
    assert (got, error["code"]) == (status, code), error


async def test_a_zip_cut_anywhere(good: Site, zips: list[bytes]) -> None:
    """A zip that was cut off is 422, wherever."""
    for end in range(1, len(zips[0]), len(zips[0]) // 7):
        assert (await refused(good, zips[0][:end]))[0] == 422


async def test_an_adapter_that_no_slot_holds(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, loras: list[Path]
) -> None:
    """An adapter that is larger than all slots together is 413 and says both sizes."""
    async with open_site(tiny_base, tmp_path / "data") as site:
        ready = site.state.uploads.require_ready()
        ready.max_adapter_bytes = 1000
        answer = await site.upload("a", zip_folder(loras[0]))
        assert (answer.status_code, error_of(answer)["code"]) == (413, "artifact_too_large")
        assert "1000" in error_of(answer)["message"] and site.stored() == set()
        ready.max_adapter_bytes = 2**20


async def test_what_is_compiled_counts_on_the_device(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot holds what an artifact compiles to, which may be less than what was trained: 4 bytes a number."""
    folder = make_multitask(tmp_path / "hat", tiny_base, 1)
    async with open_site(tiny_base, tmp_path / "data") as site:
        monkeypatch.setattr(require_ready(site.state.client), "max_adapter_bytes", 20 * 64 * 4 - 1)
        assert (await site.upload("a", zip_folder(folder))).status_code == 413
        monkeypatch.setattr(require_ready(site.state.client), "max_adapter_bytes", 20 * 64 * 4)
        body = (await site.upload("a", zip_folder(folder))).json()
        assert (body["slot_bytes"], body["virtual_tokens"]) == (20 * 64 * 4, 20)
        assert body["num_parameters"] == 20 * 64 + 2 * (20 + 64)


async def test_a_manifest_of_this_base(site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """A manifest that names this base is checked and said so; its prompt format writes the messages."""

    def manifest(folder: Path) -> None:
        around = {"user": {"before": "Q: ", "after": "\n"}, "generation": "A:"}
        base = {"name": "tiny", "identity": base_identity(tiny_base).identity, "weights": "b" * 64}
        said = {"format_version": 1, "method": "lora", "base": base, "prompt_format": around}
        (folder / MANIFEST).write_text(json.dumps(said))

    answer = await site.upload("a", edited(loras[0], tmp_path / "with", manifest))
    assert answer.status_code == 201
    assert "matches" in next(check["detail"] for check in answer.json()["checks"] if check["name"] == "base")
    messages = [{"role": "user", "content": "hi {{ 7 * 7 }}"}]
    await site.ask("a", messages=messages)
    assert bytes(site.engine.submitted[-1].prompt) == b"Q: hi {{ 7 * 7 }}\nA:"
    await site.upload("plain", zip_folder(loras[1]))
    body = {"messages": messages, "adapters": [{"task": "a"}, {"task": "plain"}]}
    answer = await site.post("/generate", body)
    assert (answer.status_code, error_of(answer)["param"]) == (422, "messages")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-rar", "multipart/form-data", "x" * 500])
async def test_content_type(good: Site, zips: list[bytes], kind: str) -> None:
    """Any other content type, or none, is 415 and says what to send."""
    got, error = await refused(good, zips[0], kind)
    assert (got, error["code"]) == (415, "unsupported_type")
    assert ZIP in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize("kind", CONTENT_TYPES)
async def test_the_bytes_say_what_they_are(site: Site, loras: list[Path], zips: list[bytes], kind: str) -> None:
    """Whatever a client calls them: a zip, a tar.gz and a safetensors file are each taken for what they are."""
    with_config = {"adapter_config": (loras[0] / CONFIG).read_text()}
    tar = tar_of(read_files(loras[0]))
    for body in (zips[0], tar, save(load_file(loras[0] / WEIGHTS), with_config)):
        assert (await site.upload("a", body, kind)).status_code in (200, 201)


async def test_a_trainers_folder(site: Site, loras: list[Path], tmp_path: Path) -> None:
    """Of a trainer's folder the adapter is taken, and the answer says what is not: template, tokenizer, pickles."""
    others = {
        "training_args.bin": pickle.dumps({}),
        "chat_template.jinja": b"{{ x }}",
        "checkpoint-5/optimizer.pt": b"x",
    }
    checkpoint = {f"checkpoint-5/{name}": data for name, data in read_files(loras[1]).items()}
    body = zip_of(*{**checkpoint, **others, **read_files(loras[0])}.items())
    answer = await site.upload("a", body)
    assert (answer.status_code, answer.json()["digest"]) == (201, read_folder(loras[0]).digest)
    (ignored,) = [check for check in answer.json()["checks"] if check["name"] == "ignored"]
    assert ignored["figure"] == 5 and ignored["ok"]
    assert all(name in ignored["detail"] for name in others) and "checkpoint-5/adapter_model" in ignored["detail"]
    assert "the base's own tokenizer and chat template" in ignored["detail"]


async def test_a_file_in_a_form(site: Site, zips: list[bytes], loras: list[Path]) -> None:
    """A form with a file, as `curl -F` and browsers send one, is that file, in parts of any size."""
    digest = read_folder(loras[0]).digest
    answer = await site.http.post("/adapters?task=a", files={"file": ("hat.zip", zips[0], "application/zip")})
    assert (answer.status_code, answer.json()["digest"]) == (201, digest)


async def test_content_type_with_parameters(site: Site, zips: list[bytes]) -> None:
    """Case and parameters of a content type do not matter."""
    assert (await site.upload("a", zips[0], "Application/ZIP; charset=x")).status_code == 201


@pytest.mark.parametrize("task", ["", "A", "a b", "-a", "x" * 64, "../a", "é", "base"])
async def test_task_names(site: Site, zips: list[bytes], task: str) -> None:
    """A name that is no task name, or the base's, is 422 and named; nothing is kept."""
    answer = await site.upload(task, zips[0])
    assert (answer.status_code, error_of(answer)["param"]) == (422, "task")
    assert site.stored() == set()


async def test_no_task(site: Site, zips: list[bytes]) -> None:
    """An upload without a task is 422 and named."""
    answer = await site.http.post("/adapters", content=zips[0], headers={"Content-Type": ZIP})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "task")


async def test_over_the_cap(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """An upload over the cap is 413, with a length or without one, and nothing is kept."""

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(zips[0]), 1000):
            yield zips[0][at : at + 1000]

    async with open_site(tiny_base, tmp_path, max_upload_bytes=len(zips[0]) - 1) as site:
        for body in (zips[0], parts()):
            answer = await site.http.post("/adapters?task=a", content=body, headers={"Content-Type": ZIP})
            assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
        assert site.stored() == set()
    async with open_site(tiny_base, tmp_path, max_upload_bytes=len(zips[0])) as site:
        assert (await site.upload("a", zips[0])).status_code == 201


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("calls", range(8))
async def test_a_full_disk(
    good: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch, code: int, calls: int
) -> None:
    """A disk that is full or fails at any of the fsyncs is 507, and nothing is kept; with room again it is taken."""
    left, fsync = [calls], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = await good.upload("bad", zips[0])
    if answer.status_code == 201:
        assert left[0] >= 0, "an acknowledged upload must have been synced"
        return
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
    assert len(good.stored()) == 1
    assert (await good.http.get("/tasks/bad")).status_code == 404
    assert (await good.upload("bad", zips[0])).status_code == 201
    assert (await good.ask("bad", prompt="a"))["adapter"]["version"] == 1


async def test_a_full_disk_while_the_body_comes(good: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while the body is written is 507."""

    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args: Full() if path.name == "body" else opened(path, *args))
    answer = await good.upload("bad", zips[0])
    assert answer.status_code == 507 and "No space left" in error_of(answer)["message"]


async def test_a_registry_that_cannot_write(good: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that cannot write the version is 507, and the artifact does not stay without one."""

    def full(*_args: object, **_values: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(good.state.stores.registry, "add_version", full)
        answer = await good.upload("bad", zips[0])
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
    assert "No space left" in error_of(answer)["message"] and len(good.stored()) == 1
    assert (await good.upload("bad", zips[0])).status_code == 201


async def test_a_note_with_nul(site: Site, zips: list[bytes]) -> None:
    """A note that holds NUL is 422 and named; nothing is kept."""
    answer = await site.upload("a", zips[0], note="a\0b")
    assert (answer.status_code, error_of(answer)["param"]) == (422, "note")
    assert site.stored() == set()


async def test_without_an_engine(site: Site, zips: list[bytes]) -> None:
    """An upload without an engine, which could not be validated, is 503, and nothing is kept."""
    site.engine.die()
    answer = await site.upload("a", zips[0])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    site.engine.revive()
    assert site.stored() == set()


async def test_whoever_leaves_after_the_body(site: Site, zips: list[bytes]) -> None:
    """A client that leaves once its body is here: the adapter is kept whole, and the staging area is empty."""
    gone: dict[str, Any] = {"type": "http.disconnect"}
    messages = iter([{"type": "http.request", "body": zips[0], "more_body": False}, gone])

    async def receive() -> dict[str, Any]:
        return next(messages, gone)

    async def send(_message: Any) -> None:
        pass

    headers = [(b"content-type", ZIP.encode())]
    scope = {"type": "http", "method": "POST", "path": "/adapters", "query_string": b"task=a", "headers": headers}
    await site.app(scope, receive, send)
    (digest,) = site.stored()
    assert site.state.stores.blobs.read(digest).digest == digest
    assert (await site.ask("a", prompt="x"))["adapter"]["digest"] == digest


async def test_uploads_are_counted(site: Site, zips: list[bytes]) -> None:
    """Uploads are counted by how they ended."""
    await site.upload("a", zips[0])
    await site.upload("a", b"nothing")
    text = (await site.http.get("/metrics")).text
    assert 'manyhats_uploads_total{status="taken"} 1.0' in text
    assert 'manyhats_uploads_total{status="refused"} 1.0' in text


async def test_a_large_rank_is_taken(site: Site, tiny_base: Path, tmp_path: Path) -> None:
    """Any rank that fits is taken, also on all linear layers."""
    body = zip_folder(make_lora(tmp_path / "big", tiny_base, 9, r=33))
    answer: httpx2.Response = await site.upload("a", body)
    assert answer.status_code == 201, answer.text


async def test_half_precision_is_taken(site: Site, loras: list[Path], tmp_path: Path) -> None:
    """An adapter in bf16 is taken."""

    def halve(folder: Path) -> None:
        found = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
        (folder / WEIGHTS).write_bytes(save(found))

    assert (await site.upload("a", edited(loras[0], tmp_path / "half", halve))).status_code == 201
