"""Stores of artifacts and registries: the same server over a folder and SQLite, and over S3 and PostgreSQL."""

from __future__ import annotations

import io
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs

from adapters_store.format.folder import WEIGHTS
from adapters_store.storage.bucket import UNCACHED, Bucket
from tests.kit.services import postgresql, s3
from tests.server.world import Site, error_of, open_site, serve_real, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["folder and SQLite", "S3 and PostgreSQL"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings of where things are kept."""
    if request.param == "folder and SQLite":
        yield {"store": str(tmp_path / "elsewhere"), "registry": f"sqlite:///{tmp_path / 'registry.db'}"}
        return
    with s3(tmp_path, "hats") as environment, postgresql() as url:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield {"store": "s3://hats/some/prefix", "registry": url}


async def tokens(site: Site, task: str) -> list[int]:
    found = await site.ask(task, prompt="Once", max_tokens=8, ignore_eos=True)
    ids: list[int] = found["choices"][0]["token_ids"]
    return ids


async def die(site: Site) -> None:
    """Kill the engine and wait for the next one, which has loaded nothing."""
    client = site.process
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.ready is None)
    await until(lambda: client.ready is not None, seconds=120)


def flip(store: str, digest: str) -> None:
    """Change one bit of a stored artifact's weights."""
    files, root = url_to_fs(store, **UNCACHED)
    path = f"{root}/{digest[:2]}/{digest}/{WEIGHTS}"
    data = bytearray(files.cat_file(path))
    data[-1] ^= 1
    files.pipe_file(path, bytes(data))


async def test_what_is_kept_is_served_and_what_is_corrupt_is_not(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], kept: dict[str, Any]
) -> None:
    """An upload is there after a restart, verified. A flipped bit is 503 `artifact_corrupt`, quarantined; for others
    nothing changes, and the same upload again heals it."""
    data = tmp_path / "data"
    async with serve_real(tiny_base, data, **kept) as site:
        digests = [(await site.upload(f"t{number}", body)).json()["digest"] for number, body in enumerate(zips[:2])]
        before = [await tokens(site, task) for task in ("t0", "t1")]
        assert not any((data / "artifacts").glob("??"))
    async with serve_real(tiny_base, data, **kept) as site:
        assert [await tokens(site, task) for task in ("t0", "t1")] == before
        kept_zip = (await site.http.get("/tasks/t0/versions/1/artifact")).raise_for_status().content
        with zipfile.ZipFile(io.BytesIO(kept_zip)) as archive:
            assert archive.testzip() is None and archive.namelist()
        flip(kept["store"], digests[0])
        await die(site)
        for _ in range(2):
            answer = await site.post("/generate?task=t0", {"prompt": "Once", "max_tokens": 8})
            assert (answer.status_code, error_of(answer)["code"]) == (503, "artifact_corrupt")
        assert await tokens(site, "t1") == before[1]
        assert (await site.http.get("/tasks/t0")).json()["versions"][0]["residency"] == "quarantined"
        answer = await site.http.get("/tasks/t0/versions/1/artifact")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "artifact_corrupt")
        assert (await site.upload("t0", zips[0])).status_code == 200
        assert await tokens(site, "t0") == before[0]
        assert (await site.http.delete("/tasks/t0")).status_code == 204
        assert site.state.stores.blobs.digests() == {digests[1]}


async def test_a_store_of_another_registry(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """A server with another registry does not start on a store that is not its own, and nothing there is swept."""
    store = str(tmp_path / "store")
    async with open_site(tiny_base, tmp_path / "one", store=store) as site:
        await site.upload("a", zips[0])
        kept = site.stored()
    with pytest.raises(Exception, match="another registry"):
        async with open_site(tiny_base, tmp_path / "two", store=store):
            pass
    async with open_site(tiny_base, tmp_path / "one", store=store) as site:
        assert site.state.stores.blobs.digests() == kept and len(kept) == 1


async def test_a_store_that_cannot_be(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A store or registry that cannot be used ends the start with a sentence."""
    refused: list[tuple[dict[str, Any], str]] = [
        ({"store": "nonsense://x"}, "nonsense"),
        ({"registry": "mysql://x/y"}, "not in mysql"),
        ({"registry": "postgresql://manyhats@127.0.0.1:1/x"}, "cannot be reached"),
    ]
    for wrong, said in refused:
        with pytest.raises(Exception, match=said):
            async with open_site(tiny_base, tmp_path / "data", **wrong):
                pass


async def test_a_store_that_refuses_access_is_503(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that a bucket takes no more are told: every request that needs the bucket gets 503 and the reason."""
    async with open_site(tiny_base, tmp_path, store=f"memory://{tmp_path.name}") as site:
        assert (await site.upload("a", zips[0])).status_code == 201
        blobs = site.state.stores.blobs
        assert isinstance(blobs, Bucket)

        def refuse(*_arguments: object, **_keywords: object) -> None:
            raise PermissionError("Access Denied")

        for method in ("cat_file", "find", "pipe_file", "rm_file"):
            monkeypatch.setattr(blobs._files, method, refuse)
        for answer in (await site.http.get("/tasks/a/versions/1/artifact"), await site.upload("b", zips[1])):
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (503, "store_unavailable"), error
            assert error["message"] == "the store of artifacts refuses access: Access Denied; check its credentials"
            assert answer.headers["retry-after"]
