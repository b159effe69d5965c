"""The house itself: what README, Makefile and the container say is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from server.engine.messages import Stats
from server.metrics import Metrics
from server.settings import Settings, variable
from tests.readme import settings_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_the_settings() -> None:
    """README lists every setting with its default and meaning (`python -m tests.readme` writes it)."""
    table = README.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert table == settings_table()


def test_the_tree_exists() -> None:
    """Every file and folder that README's tree names is there."""
    tree = README.partition("## The tree")[2]
    names = set(re.findall(r"[a-z_-]+\.(?:py|toml|yml)\b", tree))
    found = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert names and names <= found, names - found


def test_the_make_targets_exist() -> None:
    """serve, test, check and bench are targets."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("serve", "test", "check", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_compose_is_closed_by_default() -> None:
    """The server has no port beyond loopback, asks for an admin key, and runs without privileges."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    server = services["server"]
    assert ":?" in server["environment"]["MANYHATS_ADMIN_KEY"]
    assert server["cap_drop"] == ["ALL"] and server["read_only"]
    known = {variable(name) for name in Settings.model_fields}
    assert set(server["environment"]) <= known


def test_the_image_is_pinned_and_not_root() -> None:
    """The last stage has a numeric user, a health check, no build tools, and only known settings."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    last = dockerfile.rpartition("\nFROM ")[2]
    assert "USER 10001" in last and "HEALTHCHECK" in last
    assert not re.search(r"gcc|build-essential|make\b", last)
    known = {variable(name) for name in Settings.model_fields}
    assert set(re.findall(r"MANYHATS_[A-Z_]+", dockerfile)) <= known


def _expressions(dashboard: dict[str, Any]) -> str:
    return " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Every metric that a panel names is one that the server exports."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/manyhats.json").read_text())
    metrics = Metrics(Stats, lambda: None)
    exported = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    exported |= {f"{family.name}{end}" for family in metrics.registry.collect() for end in ("_total", "_bucket")}
    asked = set(re.findall(r"manyhats_[a-z_]+", _expressions(dashboard)))
    assert len(asked) > 15 and asked <= exported, asked - exported
