"""vLLM's routes to load and unload adapters: through our door, from places that the operator allows and no others."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from server.settings import Settings
from tests.server.world import Site, error_of, open_site

pytestmark = pytest.mark.anyio
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BUCKET = "memory://bucket/allowed"


@pytest.fixture
def root(tmp_path: Path, loras: list[Path]) -> Path:
    """A folder that adapters may be loaded from, with the adapter `a`; beside it lies `secret`, another one."""
    shutil.copytree(loras[0], tmp_path / "root/a")
    shutil.copytree(loras[1], tmp_path / "secret")
    return tmp_path / "root"


@pytest.fixture
async def server(anyio_backend: str, tiny_base: Path, tmp_path: Path, root: Path) -> AsyncIterator[Site]:
    """A server that may load from the folder and the bucket."""
    async with open_site(tiny_base, tmp_path / "data", allow_load_from=f"{root},{BUCKET}") as made:
        yield made


async def load(site: Site, path: object, name: str = "hat", **fields: object) -> Any:
    """The answer to a load."""
    return await site.post(LOAD, {"lora_name": name, "lora_path": str(path), **fields})


async def test_load_and_unload(server: Site, root: Path, tmp_path: Path) -> None:
    """A load is a version with vLLM's sentences, is served, and gets its next version in place; unload ends it."""
    answer = await load(server, root / "a")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'hat' added successfully.")
    assert (await server.ask("hat", prompt="a", max_tokens=1))["adapter"]["version"] == 1
    again = await load(server, root / "a")
    assert again.status_code == 400 and error_of(again)["message"] == (
        "The lora adapter 'hat' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    assert (await load(server, root / "a", load_inplace=True)).status_code == 200
    shutil.copytree(tmp_path / "secret", root / "b")
    assert (await load(server, root / "b", load_inplace=True)).status_code == 200
    assert (await server.ask("hat", prompt="a", max_tokens=1))["adapter"]["version"] == 2
    unloaded = await server.post(UNLOAD, {"lora_name": "hat"})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'hat' removed successfully.")
    gone = await server.post(UNLOAD, {"lora_name": "hat"})
    assert (gone.status_code, error_of(gone)["message"]) == (404, "The lora adapter 'hat' cannot be found.")
    assert not server.stored()


async def test_a_load_survives_a_restart(tiny_base: Path, tmp_path: Path, root: Path) -> None:
    """What was loaded is there after a restart, without the place that it came from."""
    async with open_site(tiny_base, tmp_path / "data", allow_load_from=str(root)) as site:
        assert (await load(site, root / "a")).status_code == 200
    shutil.rmtree(root)
    async with open_site(tiny_base, tmp_path / "data") as site:
        assert (await site.ask("hat", prompt="a", max_tokens=1))["adapter"]["version"] == 1


async def test_a_load_from_a_bucket(server: Site, root: Path) -> None:
    """An adapter below an allowed URL is loaded; one beside it, or by a step back, is not."""
    files = fsspec.filesystem("memory")
    for path in (root / "a").iterdir():
        for place in ("allowed/a", "other/a"):
            files.pipe_file(f"/bucket/{place}/{path.name}", path.read_bytes())
    assert (await load(server, f"{BUCKET}/a/")).status_code == 200
    for url in (
        "memory://bucket/other/a",
        f"{BUCKET}/../other/a",
        f"{BUCKET}other/a",
        BUCKET,
        f"{BUCKET}/",
        "s3://a/b",
    ):
        refused = await load(server, url, "other")
        assert (refused.status_code, error_of(refused)["param"]) == (403, "lora_path"), url
    assert (await load(server, f"{BUCKET}/none", "other")).status_code == 404


@pytest.mark.parametrize("kind", ["beside", "steps", "relative", "link", "file", "fifo", "empty", "part", "too large"])
async def test_nothing_else_is_read(server: Site, root: Path, tmp_path: Path, kind: str) -> None:
    """A path that leads out of the allowed folder, in whatever way, is refused; so is one without an adapter."""
    secret, made = tmp_path / "secret", root / "made"
    made.mkdir()
    paths: dict[str, Path] = {
        "beside": secret,
        "steps": root / "../secret",
        "relative": Path("a"),
        "link": root / "link",
    }
    (root / "link").symlink_to(secret)
    if kind == "file":
        for file in secret.iterdir():
            (made / file.name).symlink_to(file)
    elif kind == "fifo":
        os.mkfifo(made / "adapter_config.json")
    elif kind == "part":
        shutil.copy(secret / "adapter_config.json", made)
    elif kind == "too large":
        shutil.copytree(secret, made, dirs_exist_ok=True)
        os.truncate(made / "adapter_model.safetensors", int(server.state.settings.max_upload_bytes) + 1)
    answer = await load(server, paths.get(kind, made))
    statuses = {"fifo": 404, "empty": 404, "part": 400, "too large": 413}
    assert answer.status_code == statuses.get(kind, 403), answer.text
    assert not server.stored() and (await server.http.get("/tasks/hat")).status_code == 404


async def test_a_link_within_the_folder_is_followed(server: Site, root: Path) -> None:
    """Links that stay in the folder are as the hub's cache has them."""
    (root / "snapshot").mkdir()
    for file in (root / "a").iterdir():
        (root / "snapshot" / file.name).symlink_to(f"../a/{file.name}")
    assert (await load(server, root / "snapshot")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (LOAD, {"lora_name": "hat"}, "lora_path"),
        (LOAD, {"lora_path": "/x"}, "lora_name"),
        (LOAD, {"lora_name": "base", "lora_path": "/x"}, "lora_name"),
        (LOAD, {"lora_name": "Upper", "lora_path": "/x"}, "lora_name"),
        (LOAD, {"lora_name": "hat", "lora_path": ""}, "lora_path"),
        (LOAD, {"lora_name": "hat", "lora_path": "/x", "base_model_name": "b"}, "base_model_name"),
        (LOAD, {"lora_name": "hat", "lora_path": "/x", "wish": 1}, "wish"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "hat", "lora_int_id": 3}, "lora_int_id"),
    ],
)
async def test_a_body_that_cannot_be_meant(server: Site, path: str, body: dict[str, Any], param: str) -> None:
    """A field that is missing, wrong or unknown is refused by name."""
    answer = await server.post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_off_unless_it_is_allowed(site: Site, path: str) -> None:
    """A server that names no places loads and unloads nothing, and says what to do."""
    answer = await site.post(path, {"lora_name": "hat", "lora_path": "/x"})
    assert answer.status_code == 403 and "--allow-load-from" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "wrong", ["models", "file:///models", "local:///m", "s3://", "s3://a::file:///b", "/a,,/b", "/a,b"]
)
def test_places_are_checked(wrong: str) -> None:
    """A setting that names no absolute path and no URL is refused at start."""
    with pytest.raises(ValueError, match="no place to load from"):
        Settings(allow_load_from=wrong)
