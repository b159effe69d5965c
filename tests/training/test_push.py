"""Pushing over HTTP to a server: activated if it is better than what is served; a refusal loses nothing."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from adapters_store.format.folder import MANIFEST
from tests.training.conftest import flags
from training import cli
from training import push as pushing

URL = "http://server"


class Served:
    """A server in memory: versions are the bodies that it was sent, the last activated one is routed."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.route: dict[str, int] = {}
        self.queries: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.refusal: str | None = None
        self.is_down = False

    def request(self, method: str, url: str, **request: Any) -> httpx2.Response:
        """Answer in the place of `httpx2.request`."""
        self.keys.add(request["headers"].get("Authorization"))
        if self.is_down:
            raise httpx2.ConnectError("Connection refused")
        if method == "POST":
            return self._take(request["params"], request["content"])
        if url.endswith("/artifact"):
            return httpx2.Response(200, content=self.bodies[int(url.split("/")[-2]) - 1])
        return httpx2.Response(200 if self.bodies else 404, json={"route": {"versions": self.route}})

    def _take(self, query: dict[str, Any], body: bytes) -> httpx2.Response:
        if self.refusal:
            return httpx2.Response(422, json={"error": {"message": self.refusal}})
        self.queries.append(query)
        self.bodies.append(body)
        if query["activate"] == "true":
            self.route = {str(len(self.bodies)): 100}
        return httpx2.Response(201, json={"version": len(self.bodies)})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server in the place of the network."""
    found = Served()
    monkeypatch.setattr(httpx2, "request", found.request)
    return found


def push(*words: object) -> Any:
    """Run `manyhats push` in this process."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cli.push)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tiny_base: Path, data: Path, command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned. Do not write into it."""
    out = tmp_path_factory.mktemp("push") / "hat"
    result = command(*flags(tiny_base, data, out, "--layers", "all", "--steps", 40, "--lr", 0.02))
    assert result.exit_code == 0, result.output
    return out


def printed(result: Any) -> str:
    return " ".join(result.output.split())


def with_scores(folder: Path, out: Path, **changed: Any) -> Path:
    """A copy whose manifest says other scores."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["evaluation"]["after"].update(changed)
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_a_new_task_is_activated_where_it_beats_the_base(trained: Path, tmp_path: Path, served: Served) -> None:
    """Better than the base: routed to; as bad as the base: kept, and said why."""
    target = pushing.Target(URL, "hat", "secret", "mine")
    bad = with_scores(trained, tmp_path / "bad", exact_match=0.0)
    assert "Not activated: exact match is 0.000, that of the base 0.000" in pushing.push_if_better(target, bad, False)
    assert served.route == {}
    found = pushing.push_if_better(target, trained, False)
    assert "as version 2, and serves version 2. Activated" in found
    asked = {"task": "hat", "note": "mine", "activate": "true", "timeout_s": pushing.PROBES_WITHIN_S}
    assert served.queries[1] == asked
    assert served.keys == {"Bearer secret"}
    assert MANIFEST in zipfile.ZipFile(io.BytesIO(served.bodies[1])).namelist()


def test_what_is_served_must_be_beaten_on_the_same_rows(trained: Path, tmp_path: Path, served: Served) -> None:
    """A served version with scores on the same rows is compared; one without is left unless --force says so."""
    target = pushing.Target(URL, "hat")
    pushing.push_if_better(target, with_scores(trained, tmp_path / "good", exact_match=0.5), False)
    worse = with_scores(trained, tmp_path / "worse", exact_match=0.4)
    assert "serves version 1. Not activated: exact match is 0.400" in pushing.push_if_better(target, worse, False)
    assert "serves version 3. Activated: --force" in pushing.push_if_better(target, worse, True)


def test_scores_of_other_rows_are_not_compared(trained: Path, tmp_path: Path, served: Served) -> None:
    """A better score on other rows activates nothing: the sentence names both splits, and --force."""
    target = pushing.Target(URL, "hat")
    split = json.loads((trained / MANIFEST).read_text())["evaluation"]["split_sha256"]
    pushing.push_if_better(target, with_scores(trained, tmp_path / "served", exact_match=0.1), False)
    better = with_scores(trained, tmp_path / "better", exact_match=1.0)
    text = (better / MANIFEST).read_text()
    (better / MANIFEST).write_text(text.replace(split, "0" * 64).replace('"data.jsonl"', '"other.jsonl"'))
    found = pushing.push_if_better(target, better, False)
    first, second = f"40 rows of data.jsonl (split {split[:12]})", "40 rows of other.jsonl (split 000000000000)"
    assert "serves version 1. Not activated: version 1, which is served, was scored on " in found
    assert f"{first}, and this one on " in found and f"{second}; activate it with --force." in found
    assert served.queries[-1]["activate"] == "false"
    assert "serves version 3. Activated: --force" in pushing.push_if_better(target, better, True)


def test_a_served_version_without_scores_stays(trained: Path, tmp_path: Path, served: Served) -> None:
    """A served version without comparable scores stays, and it is said that it has none, or of no known split."""
    target = pushing.Target(URL, "hat")
    plain = with_scores(trained, tmp_path / "plain")
    (plain / MANIFEST).unlink()
    pushing.push_folder(target, plain)
    assert "version 1, which is served, has no scores; activate" in pushing.push_if_better(target, trained, False)
    old = with_scores(trained, tmp_path / "old")
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["evaluation"]["split_sha256"]
    (old / MANIFEST).write_text(json.dumps(manifest))
    pushing.push_folder(target, old)
    assert "(of no known split), and this one on" in pushing.push_if_better(target, trained, False)


def test_train_pushes(tiny_base: Path, data: Path, tmp_path: Path, command: Any, served: Served) -> None:
    """--push uploads to the task of --task, or of the folder's name, and says what is served."""
    result = command(
        *flags(tiny_base, data, tmp_path / "hat", "--steps", 1, "--layers", "all", "--push", URL, "--force")
    )
    assert result.exit_code == 0 and "hat has it as version 1, and serves version 1." in printed(result)


def test_a_closed_door_is_told_before_the_run(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any, served: Served
) -> None:
    """A server that is not there ends the command before anything is trained."""
    served.is_down = True
    result = command(*flags(tiny_base, data, tmp_path / "hat", "--steps", 1, "--push", URL))
    assert result.exit_code == 1 and f"{URL} cannot be reached" in printed(result)
    assert not (tmp_path / "hat").exists()


def test_a_refusal_leaves_the_artifact(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any, served: Served
) -> None:
    """After a run, a refusal is the server's own sentence, the artifact's folder and the command that pushes again."""
    served.refusal = "no room"
    chosen = flags(tiny_base, data, tmp_path / "hat", "--steps", 1, "--layers", "all", "--push", URL, "--task", "t")
    result = command(*chosen, "--force")
    assert result.exit_code == 1 and "refuses: no room" in printed(result)
    assert f"manyhats push {tmp_path / 'hat'} --task t --url {URL}" in printed(result)
    assert (tmp_path / "hat" / MANIFEST).is_file()
    assert "full" in printed(command(*flags(tiny_base, data, tmp_path / "x", "--push", URL, "--method", "full")))


def test_any_folder_can_be_pushed(trained: Path, tmp_path: Path, served: Served) -> None:
    """Also one without a manifest, which is activated unless told otherwise; what is no artifact is refused here."""
    plain = with_scores(trained, tmp_path / "plain")
    (plain / MANIFEST).unlink()
    (plain / "chat_template.jinja").touch()
    result = printed(push(plain, "--task", "t", "--url", URL))
    assert "serves version 1." in result and "Not sent, the base's own tokenizer" in result
    assert "serves version 1." in printed(push(plain, "--task", "t", "--url", URL, "--no-activate"))
    result = push(tmp_path, "--task", "t", "--url", URL)
    assert result.exit_code == 1 and "is no artifact: there is no adapter_model" in printed(result)
