"""The kit's load, proxy and metrics notice what they are there to notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.kit.adapters import make_lora, zip_folder
from tests.kit.load import Asked, load, solo
from tests.kit.metrics import Reading
from tests.kit.proxy import Fault, Proxy, proxy
from tests.server.world import Site, serve_site

pytestmark = pytest.mark.anyio
ASKED = [Asked(task, {"prompt": prompt, "max_tokens": 6}) for task in ("a", "base") for prompt in ("one", "two")]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def site(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """A server that listens, with the task a."""
    async with serve_site(tiny_base, tmp_path / "data") as made:
        body = zip_folder(make_lora(tmp_path / "hat", tiny_base, r=2, target_modules=["q_proj"]))
        assert (await made.upload("a", body)).status_code == 201
        yield made


async def reading(site: Site) -> Reading:
    return Reading.of((await site.http.get("/metrics")).text)


async def test_load_checks_what_it_gets(site: Site) -> None:
    """Every answer is compared with the solo one; one other token is a mismatch; metrics count all that was asked."""
    right = await solo(site.http, ASKED)
    before = await reading(site)
    report = await load(site.http, ASKED, right, num_clients=3, seconds=600, most=12)
    assert (report.statuses, report.num_right, report.mismatches) == ({200: 12}, 12, [])
    changed = (await reading(site)).since(before)
    assert changed.value("manyhats_requests_total", status="200") == 12
    assert changed.value("manyhats_requests_total", task="a") == 6
    right[1] = [[*right[1][0][:-1], 0]]
    report = await load(site.http, ASKED, right, num_clients=2, seconds=600, most=8)
    assert [asked for asked, _ in report.mismatches] == [ASKED[1]] * 2 and report.num_right == 6
    assert report.percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and len(report.first) == 8


async def through(made: Proxy, task: str = "base") -> httpx2.Response:
    """A plain answer through a proxy."""
    async with httpx2.AsyncClient(base_url=made.url, timeout=120) as http:
        return await http.post(f"/generate?task={task}", json={"prompt": "one", "max_tokens": 6})


async def test_a_proxy_spoils(site: Site) -> None:
    """Without a fault it is not noticed, in drops neither; an answer that is cut or reset is an error of transport."""
    url = site.http.base_url
    async with proxy(url.host, url.port or 0) as made:
        assert (await through(made)).status_code == 200
        made.down = Fault(chunk=7)
        assert (await through(made)).status_code == 200
        made.down = Fault(cut_at=40)
        with pytest.raises(httpx2.RemoteProtocolError):
            await through(made)
        made.down = Fault(cut_at=0, is_reset=True)
        with pytest.raises(httpx2.TransportError):
            await through(made)
        assert made.num_connections == 4


async def test_an_upload_that_is_cut_off_leaves_nothing(site: Site, tiny_base: Path, tmp_path: Path) -> None:
    """A body that breaks off in the middle is no upload: nothing is stored, and the server goes on."""
    body, stored = zip_folder(make_lora(tmp_path / "other", tiny_base, 1, r=2)), site.stored()
    url = site.http.base_url
    async with (
        proxy(url.host, url.port or 0, up=Fault(cut_at=len(body) // 2)) as made,
        httpx2.AsyncClient(base_url=made.url, timeout=120) as http,
    ):
        with pytest.raises(httpx2.TransportError):
            await http.post("/adapters?task=b", content=body, headers={"Content-Type": "application/zip"})
    assert (await site.http.get("/tasks/b")).status_code == 404
    assert site.stored() == stored and (await site.ask("base", prompt="x"))["choices"]
