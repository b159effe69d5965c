"""The house itself: what the tree, the settings, the hooks and the container say is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.engine.messages import Stats
from server.metrics import Metrics
from server.settings import Settings, variable
from tests.readme import settings_table

ROOT = Path(__file__).parent.parent
ARCHITECTURE_PAGE = (ROOT / "docs/architecture.md").read_text()
SETTINGS_PAGE = (ROOT / "docs/settings.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/manyhats.json").read_text())
VARIABLES = {variable(name) for name in Settings.model_fields}


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture
def compose() -> dict[str, Any]:
    return _yaml("docker-compose.yml")  # type: ignore[no-any-return]


# Pages, Makefile and hooks (what all pages say is held in tests/docs)


def test_the_settings_table_is_the_settings() -> None:
    """The page of settings lists every setting with its default and meaning (`python -m tests.readme` writes it)."""
    table = SETTINGS_PAGE.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert table == settings_table()


def _tree() -> Iterator[tuple[Path, str]]:
    """Every (folder, name) of the tree in the page of the architecture, by indentation.

    What a folder's line names behind it lies in that folder.
    """
    folders = [ROOT]
    for line in ARCHITECTURE_PAGE.partition("## The tree")[2].split("```")[1].splitlines()[1:]:
        depth, (name, *rest) = (len(line) - len(line.lstrip())) // 2, line.split()
        folder = folders[depth]
        yield folder, name
        if name.endswith("/"):
            folders[depth + 1 :] = [folder / name]
            words = re.findall(r"(?<![\w/])[\w-]+(?:\.(?:py|toml|yml)\b|/)", " ".join(rest))
            yield from ((folder / name, word) for word in words)


def test_the_tree_exists() -> None:
    """Every file and folder of the tree is where the tree has it."""
    tree = list(_tree())
    missing = [str((folder / name).relative_to(ROOT)) for folder, name in tree if not (folder / name).exists()]
    assert len(tree) > 100 and not missing, missing


@pytest.mark.parametrize("package", ["adapters_store", "server", "training"])
def test_the_tree_is_whole(package: str) -> None:
    """Every file and folder at the top of a package has its line in the tree."""
    named = {name.rstrip("/") for folder, name in _tree() if folder == ROOT / package}
    hidden = ("__", ".", "py.typed")
    found = {path.name for path in (ROOT / package).iterdir() if not path.name.startswith(hidden)}
    assert found <= named, f"the tree lacks {sorted(found - named)} of {package}/"


def test_what_python_compiles_is_kept() -> None:
    """Modules are installed without being compiled, so no recipe may tell Python to throw away what it compiles."""
    command = ["make", "--no-print-directory", "--eval", "shown: ; @env", "shown"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "KEPT=1" in shown and "PYTHONDONTWRITEBYTECODE" not in shown


def test_the_hooks_are_what_make_check_runs() -> None:
    """`pre-commit` runs the commands of `make check`, each with the tools of .venv, and fetches nothing."""
    recipe = re.findall(r"^\t\$\(BIN\)/(.*)$", MAKEFILE.partition("\ncheck:")[2].partition("\n\n")[0], re.MULTILINE)
    (repository,) = _yaml(".pre-commit-config.yaml")["repos"]
    hooks = repository["hooks"]
    assert repository["repo"] == "local" and {hook["language"] for hook in hooks} == {"system"}
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    given = (".", "Dockerfile", "docker-compose.yml")  # pre-commit itself says which files
    assert entries == [" ".join(word for word in line.split() if word not in given) for line in recipe]


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


def test_the_dashboard_groups_by_labels_that_exist() -> None:
    """Every label that a panel groups by, or shows, is one of its metric, and a task stands beside its tenant."""
    labels_of = {
        f"manyhats_{metric._name.removeprefix('manyhats_')}": names
        for metric, names in Metrics(Stats, lambda: None)._metrics
    }
    for target in (target for panel in DASHBOARD["panels"] for target in panel["targets"]):
        (grouped,) = re.findall(r"by \(([a-z_, ]+)\)", target["expr"]) or ("",)
        used = {*re.findall(r"[a-z_]+", grouped), *re.findall(r"{{([a-z_]+)}}", target["legendFormat"])} - {"le"}
        named = re.findall(r"(manyhats_[a-z_]+?)(?:_total|_bucket)?\b", target["expr"])
        known = [labels_of[name] for name in named if name in labels_of]
        assert "task" not in used or "tenant" in used, target
        assert used <= frozenset().union(*known) | {"process", "part"}, target
