"""Nothing is left of tenants that lived and died: no file descriptor, thread or series; `soak.py` looks for longer."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.kit.metrics import Reading
from tests.server.soak import ADMIN, KEY, Samples, bodies_of, counts_of, live_and_die
from tests.server.test_listen import serving
from tests.server.world import until

pytestmark = pytest.mark.anyio


async def test_nothing_is_left(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Descriptors and threads are as many after the fourth life as after the second; no tenant has series."""
    bodies = bodies_of(tiny_base, tmp_path, ("ia3",))
    async with serving(tiny_base, tmp_path / "data", admin_key=KEY) as (site, _):
        site.engine.delay_s = 0.002
        counts = []
        for number in range(4):
            await live_and_die(site.http, f"soak-{number}", bodies)
            await until(lambda: not site.engine.stats.num_running, 30)
            counts.append(counts_of(psutil.Process(), "all"))
        series = Reading.of((await site.http.get("/metrics", headers=ADMIN)).text).samples
    assert not [key for key in series if any(value.startswith("soak-") for _, value in key[1])]
    for name, in_pools in (("all fds", 2), ("all threads", 4)):  # pools open what they hold one by one
        assert counts[3][name] <= counts[1][name] + in_pools, (name, counts)


def test_what_grows_is_told() -> None:
    """A number that goes on growing is told, one that grew in the first quarter alone is not."""
    samples = Samples()
    for second in range(100):
        samples.add(second, {"memory": 100 + second, "series": 100 + min(second, 20), "front fds": 9 + second % 2})
    assert set(samples.grown()) == {"memory"}
