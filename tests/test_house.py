"""The house itself: what README, Makefile and the container say is true."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.engine.messages import Stats
from server.metrics import Metrics
from server.settings import Settings, flags_of, variable
from tests.readme import settings_table
from training.cli import train
from training.compare.command import compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/manyhats.json").read_text())
VARIABLES = {variable(name) for name in Settings.model_fields}


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture
def compose() -> dict[str, Any]:
    return _yaml("docker-compose.yml")  # type: ignore[no-any-return]


# README and Makefile


def test_the_settings_table_is_the_settings() -> None:
    """README lists every setting with its default and meaning (`python -m tests.readme` writes it)."""
    table = README.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert table == settings_table()


def _tree() -> Iterator[tuple[Path, str]]:
    """Every (folder, name) of README's tree: a line that is not indented opens a folder."""
    folder = ROOT
    for line in README.partition("## The tree")[2].split("```")[1].strip().splitlines():
        if not line.startswith(" "):
            name = line.split()[0]
            folder = ROOT / name if name.endswith("/") else ROOT
            yield ROOT, name
        yield from ((folder, name) for name in re.findall(r"(?<![\w/])[\w-]+(?:\.(?:py|toml|yml)\b|/)", line))


def test_the_tree_exists() -> None:
    """Every file and folder of README's tree is where the tree has it, or one folder below."""
    tree = list(_tree())
    missing = [name for folder, name in tree if not any((p / name).exists() for p in (folder, ROOT, *folder.iterdir()))]
    assert len(tree) > 40 and not missing, missing


@pytest.mark.parametrize("package", ["adapters_store", "server", "training"])
def test_the_tree_is_whole(package: str) -> None:
    """Every file and folder at the top of a package has its line in README's tree."""
    named = {name.rstrip("/") for folder, name in _tree() if folder == ROOT / package}
    found = {path.name for path in (ROOT / package).iterdir() if not path.name.startswith(("__", "."))}
    assert found <= named, f"README's tree lacks {sorted(found - named)} of {package}/"


def test_the_paths_in_the_text_exist() -> None:
    """Every path of this repository that README's text or picture points to is there."""
    paths = re.findall(r"(?:tests|adapters_store|server|training|docs|deploy)/[\w./-]*[\w/]", README)
    assert len(paths) > 5
    assert all((ROOT / path).exists() for path in paths), [path for path in paths if not (ROOT / path).exists()]


def test_the_make_targets_exist() -> None:
    """Every target that README or CI calls is in the Makefile, and needs nothing that was set up by hand."""
    called = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)", README + (ROOT / ".ci/run").read_text()))
    assert called >= {"serve", "test", "check", "bench"}
    for target in called - {"clean"}:
        assert re.search(rf"^{target}: \$\(VENV\)/\.installed$", MAKEFILE, re.MULTILINE), target


def test_the_flags_in_the_text_exist() -> None:
    """Every flag of `manyhats train`, `compare` and `serve` that README or the Makefile uses is one."""
    ours = {flag for name, field in Settings.model_fields.items() for flag in flags_of(name, field)}
    taken = {
        "train": set(inspect.signature(train).parameters),
        "compare": set(inspect.signature(compare).parameters),
        "serve": {flag.removeprefix("--").replace("-", "_") for flag in ours},
    }
    commands = re.findall(r"manyhats (train|compare|serve)((?: (?:\\\n)?|\n(?= +--)|[^`\n ]+)+)", README + MAKEFILE)
    assert {command for command, _ in commands} == {*taken}
    for command, words in commands:
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", words)} - {"help"}
        assert flags <= taken[command], flags - taken[command]


# Container


def test_compose_is_closed_by_default(compose: dict[str, Any]) -> None:
    """No port is open beyond loopback; the server asks for an admin key and runs without privileges."""
    assert all(port.startswith("127.0.0.1:") for service in compose["services"].values() for port in service["ports"])
    server = compose["services"]["server"]
    assert ":?" in server["environment"]["MANYHATS_ADMIN_KEY"]
    assert server["cap_drop"] == ["ALL"] and server["read_only"]
    assert set(server["environment"]) <= VARIABLES


def test_compose_agrees_with_the_image(compose: dict[str, Any]) -> None:
    """Volumes are the image's, the port and the imported folder are there, and a stop outlasts the server's drain."""
    server = compose["services"]["server"]
    assert [volume.split(":")[1] for volume in server["volumes"]] == json.loads(_instruction("VOLUME"))
    assert [port.split(":")[-1] for port in server["ports"]] == [_instruction("EXPOSE")]
    assert f"adapters_store/examples {server['environment']['MANYHATS_IMPORT']}\n" in DOCKERFILE
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_s"].default
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert set(server["build"]["args"]) == arguments


def test_what_compose_mounts_is_there(compose: dict[str, Any]) -> None:
    """Every file and folder of this repository that a service is given exists; every foreign image has a version."""
    volumes = [volume for service in compose["services"].values() for volume in service["volumes"]]
    mounted = [volume.split(":")[0] for volume in volumes if volume.startswith(".")]
    files = [config["file"] for config in compose["configs"].values()]
    assert len(mounted + files) == 3 and all((ROOT / path).exists() for path in mounted + files)
    named = {volume.split(":")[0] for volume in volumes} - set(mounted)
    assert named == set(compose["volumes"])
    images = [service["image"] for service in compose["services"].values() if "build" not in service]
    assert len(images) == 2 and all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", image) for image in images)


def _instruction(name: str) -> str:
    """The words of an instruction of the Dockerfile's last stage."""
    found = re.search(rf"^{name} (.*)$", _last_stage(), re.MULTILINE)
    assert found, name
    return found[1]


def _last_stage() -> str:
    return DOCKERFILE.rpartition("\nFROM ")[2]


def test_the_image_runs_with_little() -> None:
    """The last stage has a numeric user, a health check and only known settings; it installs and compiles nothing."""
    last = _last_stage()
    assert _instruction("USER") == "10001" and "useradd --uid 10001" in DOCKERFILE and "HEALTHCHECK" in last
    assert "RUN" not in last and not re.search(r"gcc|build-essential|g\+\+", DOCKERFILE)
    assert set(re.findall(r"MANYHATS_[A-Z_]+", DOCKERFILE)) <= VARIABLES


def test_the_image_has_one_python() -> None:
    """The paths of site-packages in the Dockerfile are those of the Python it starts from."""
    base = re.findall(r"^FROM python:(\d+\.\d+)-slim", DOCKERFILE, re.MULTILINE)
    assert len(base) == 1 and set(re.findall(r"lib/python(\d+\.\d+)", DOCKERFILE)) == set(base)


def test_the_context_holds_what_is_copied() -> None:
    """What the Dockerfile copies from here is let through by .dockerignore, which lets through nothing else."""
    sources = {word for line in re.findall(r"^COPY ([^-].*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]}
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sources == set(allowed) and all((ROOT / source).exists() for source in sources)


# Prometheus and Grafana


def test_prometheus_may_scrape(compose: dict[str, Any]) -> None:
    """Prometheus asks the server's own port, with the admin key from the secret that compose gives it."""
    (job,) = _yaml("deploy/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{_instruction('EXPOSE')}"]}]
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets") and secret.name in compose["services"]["prometheus"]["secrets"]
    assert compose["secrets"][secret.name] == {"environment": "MANYHATS_ADMIN_KEY"}
    assert set(compose["services"]["prometheus"]["configs"][0].values()) >= {"/etc/prometheus/prometheus.yml"}


def test_grafana_finds_its_dashboard(compose: dict[str, Any]) -> None:
    """Data source and dashboards are provisioned from folders that compose mounts, and every panel uses that source."""
    grafana = compose["services"]["grafana"]
    mounts = {target: source for source, target, _ in (volume.split(":") for volume in grafana["volumes"][:2])}
    (source,) = _yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    (provider,) = _yaml("deploy/grafana/provisioning/dashboards/manyhats.yml")["providers"]
    folder = mounts[provider["options"]["path"]]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / folder / home.name).is_file() and str(home.parent) == provider["options"]["path"]


def test_the_panels_have_places_of_their_own() -> None:
    """No two panels share an id or a place."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Every metric that a panel names is one that the server exports, in the form that its type has."""
    families = Metrics(Stats, lambda: None).registry.collect()
    exported = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}
    expressions = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    asked = set(re.findall(r"manyhats_[a-z_]+", expressions))
    assert len(asked) > 15 and asked <= exported, asked - exported
