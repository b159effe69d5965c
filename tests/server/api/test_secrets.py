"""What a key may give away, who may read what is kept, and what a tenant may have on its way."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator
from itertools import combinations
from pathlib import Path

import pytest

from server.engine.client import EngineStartError
from server.engine.process_client import ProcessEngineClient
from server.uploads.service import PACKING_BYTES
from tests.server.api.test_tenants import ALL, KEY, City
from tests.server.world import Site, error_of, open_site, settings_of, until

pytestmark = pytest.mark.anyio
SETS = [list(scopes) for size in (1, 2, 3) for scopes in combinations(ALL, size)]


@pytest.fixture
async def city(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> AsyncIterator[City]:
    """A server with an admin key."""
    async with open_site(tiny_base, tmp_path / "data", admin_key=KEY) as site:
        yield City(site)


@pytest.mark.parametrize("scopes", [scopes for scopes in SETS if "admin" in scopes])
async def test_no_scope_mints_a_wider_one(city: City, scopes: list[str]) -> None:
    """A key makes and rotates keys of every set of scopes that it has itself, and of no other; the operator of any."""
    await city.tenant("a")
    key = await city.key("a", scopes)
    for wanted in SETS:
        made = await city.ask(key, "POST", "/tenants/a/keys", {"scopes": wanted})
        known = (await city.key("a", wanted)).partition(".")[0]
        rotated = await city.ask(key, "POST", f"/tenants/a/keys/{known}/rotate")
        is_narrower = set(wanted) <= set(scopes)
        assert (made.status_code, rotated.status_code) == ((201, 200) if is_narrower else (403, 403)), wanted
        if not is_narrower:
            assert error_of(made)["message"].startswith("a key with the scope")


async def test_making_keys_counts(city: City) -> None:
    """Requests that change keys are requests of the tenant's rate; the operator's are not."""
    key = await city.tenant("a", requests_per_minute=3)
    statuses = [(await city.ask(key, "POST", "/tenants/a/keys", {"scopes": ["admin"]})).status_code for _ in range(4)]
    assert statuses == [201, 201, 201, 429]
    assert (await city.ask(key, "GET", "/tenants/a/keys")).status_code == 200, "a look is counted apart"
    await city.key("a", ["admin"])


async def test_nobody_else_reads_the_data_folder(city: City, zips: list[bytes]) -> None:
    """Every file below the data folder is 0600 and every folder 0700, whatever the process's mask was."""
    await city.tenant("a")
    assert (await city.ask(KEY, "POST", "/adapters?task=one", zips[0])).status_code == 201
    data = city.site.data
    modes = {str(path.relative_to(data)): oct(path.stat().st_mode & 0o777) for path in (data, *data.rglob("*"))}
    assert len(modes) > 6
    assert {name: mode for name, mode in modes.items() if mode not in ("0o600", "0o700")} == {}


async def test_the_engine_inherits_no_secret(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine inherits no setting of the server but the folder of kernels, and no password of the database."""
    for name in ("MANYHATS_ADMIN_KEY", "MANYHATS_REGISTRY", "PGPASSWORD", "MANYHATS_CACHE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, f"the value of {name}")
    program = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))"
    command = (sys.executable, "-c", program, str(tmp_path / "environment"))
    client = ProcessEngineClient(
        settings_of(tiny_base, tmp_path, registry=None, admin_key=KEY).engine_config(tiny_base), command=command
    )
    with pytest.raises(EngineStartError):
        await client.start()
    await client.close()
    found = json.loads((tmp_path / "environment").read_text())
    assert "PATH" in found and "AWS_ACCESS_KEY_ID" in found, "loaders open the store"
    assert [name for name in found if name.startswith(("MANYHATS_", "PG"))] == ["MANYHATS_CACHE"]


async def test_a_quota_counts_what_is_on_its_way(city: City) -> None:
    """A tenant's bodies on their way have at most its bytes together: one over it is 429 before it is whole."""
    key = await city.tenant("a", max_bytes=100)
    site, headers = city.site, {"Authorization": f"Bearer {key}", "Content-Type": "application/zip"}
    going_on, sent = asyncio.Event(), []

    async def body(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 10_000):
            sent.append(size)
            yield b"x" * 10_000
        await going_on.wait()

    first = asyncio.create_task(site.http.post("/adapters?task=one", content=body(40_000), headers=headers))
    await until(lambda: staged(site) == 40_000)
    answer = await site.http.post("/adapters?task=two", content=body(1_000_000), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (429, "tenant_limit")
    assert "on their way" in error_of(answer)["message"]
    assert sent.count(1_000_000) * 10_000 <= PACKING_BYTES
    going_on.set()
    assert (await first).status_code in (415, 422)
    assert not site.state.uploads._staged and not site.staged()


@pytest.mark.parametrize("is_zip", [True, False])
async def test_a_quota_counts_what_is_unpacked(city: City, is_zip: bool) -> None:
    """A small body that unpacks to more than its tenant may hold is the tenant's 429 before anything is written."""
    key, packed = await city.tenant("a", max_bytes=1000), io.BytesIO()
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(500_000)}
    if is_zip:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/zip"}
    answer = await city.site.http.post("/adapters?task=one", content=packed.getvalue(), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (429, "tenant_limit")
    assert "tenant a" in error_of(answer)["message"] and "1000 bytes" in error_of(answer)["message"]
    assert not city.site.state.uploads._staged and not city.site.staged()


def staged(site: Site) -> int:
    """Bytes of bodies that are on their way."""
    return site.state.uploads._staged.total()
