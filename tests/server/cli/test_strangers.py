"""Whatever a name is and whatever a server answers: a command asks for that name alone, and ends with a sentence."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from adapters_store.escapes import url_path
from adapters_store.format.archive import zipped
from adapters_store.format.folder import read_files
from server.cli.main import Commands, _options
from tests.kit.families import FAMILIES
from tests.server.cli.test_commands import params, tree

WORDS = {  # of every command that asks a server, with a name that a user gives
    "tasks": ["NAME"],
    "route": ["NAME", "1=95", "2=5"],
    "rollback": ["NAME"],
    "pin": ["NAME"],
    "rm": ["NAME", "--yes"],
    "pull": ["NAME", "--out", "OUT"],
    "push": ["FOLDER", "--task", "NAME"],
    "keys create": ["--tenant", "NAME"],
    "keys list": ["--tenant", "NAME"],
    "keys rotate": ["NAME"],
    "keys revoke": ["NAME"],
}
ODD = ["a#2", "a?x=1", "a%2Fb", "ä b;:", "a\x1b]0;x\x07", "\udcff"]
REFUSED = ["", ".", "..", "x/../a", "a/versions/3", "/"]
NO_VERSION = ["a@", "a@0", "a@x", "a@1@2", "a@-1", "a@1/..", "@1", "@"]
VERSION = {
    "version": 1, "digest": "d", "method": "lora", "num_parameters": 1, "bytes": 1, "slot_bytes": None,
    "virtual_tokens": 0, "note": "", "created": 0.0, "residency": "disk",
    "use": {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0},
    "recent": {"requests": 0, "failed": 0, "ttft_ms": None, "latency_ms": None, "tokens": 0},
}  # fmt: skip
TASK = {
    "task": "a", "versions": [VERSION], "route": {"versions": {"1": 1}, "sticky": None}, "pinned": False,
    "num_versions": 1,
}  # fmt: skip
KEY = {"id": "mh_a", "tenant": "a", "scopes": ["generate"], "note": "", "created": 0.0}
CLOSED = {"residency", "sticky", "scopes", "next"}  # keys whose values are few
EVIL = "\x1b]0;x\x07\x9b\x7f\ud800"
APP = Typer(cls=Commands, callback=_options, pretty_exceptions_enable=False)
Handler = Callable[[httpx2.Request], httpx2.Response]


def evil(value: Any) -> Any:
    """Put what a terminal obeys into every string of an answer that may be any."""
    if isinstance(value, dict):
        return {name: part if name in CLOSED else evil(part) for name, part in value.items()}
    if isinstance(value, list):
        return [evil(part) for part in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder to push."""
    return FAMILIES["lora"](tmp_path_factory.mktemp("strangers") / "lora", tiny_base, 1)


@pytest.fixture
def world(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A place to run commands in, over a server in memory."""
    return World(folder, tmp_path, monkeypatch)


class World:
    """Runs commands over what answers them; it keeps the requests."""

    def __init__(self, folder: Path, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.patch = folder, out, patch
        self.paths: list[str] = []

    def answer(self, handler: Handler) -> None:
        """Let a function answer all requests from now on."""

        def seen(request: httpx2.Request) -> httpx2.Response:
            self.paths.append(request.url.raw_path.decode().partition("?")[0])
            return handler(request)

        def send(*arguments: Any, **options: Any) -> httpx2.Response:
            with httpx2.Client(transport=httpx2.MockTransport(seen)) as client:
                return client.request(*arguments, **options)

        self.patch.setattr(httpx2, "request", send)

    def run(self, said: str, *more: str, name: str = "a", url: str = "http://h") -> Result:
        """Run a command with a name."""
        here = {"NAME": name, "OUT": str(self.out / "out"), "FOLDER": str(self.folder)}
        words = [here.get(word, word) for word in WORDS[said]]
        options = [*more, "--url", url, "--api-key", "k"]
        return CliRunner().invoke(APP, [*said.split(), *words, *options], env={"COLUMNS": "200", "NO_COLOR": "1"})

    def good(self, request: httpx2.Request) -> httpx2.Response:
        """Answer as manyhats does."""
        path = request.url.path
        if request.method == "DELETE":
            return httpx2.Response(204)
        if path.endswith("/artifact"):
            return httpx2.Response(200, content=zipped(read_files(self.folder)))
        if path.startswith("/tenants"):
            return httpx2.Response(200, json={"keys": [KEY]} if request.method == "GET" else {**KEY, "key": "secret"})
        return httpx2.Response(200, json={**TASK, "version": 1})


def assert_told(result: Result, said: str) -> None:
    """The command ended with code 1 and a sentence, and not by an exception."""
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, (said, result.exception)
    assert f"manyhats {said}:" in result.stderr and "Traceback" not in result.output, result.output
    assert_printable(result)


def assert_printable(result: Result) -> None:
    """Nothing that was printed is obeyed by a terminal."""
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stdout + result.stderr), repr(result.output)


def test_every_command_that_asks_a_server_is_here() -> None:
    """The commands that take `--url` are those that these tests walk."""
    assert {said for said, command in tree().items() if any("--url" in one.opts for one in params(command))} == {*WORDS}


@pytest.mark.parametrize("said", WORDS)
def test_a_name_is_one_part_of_the_path(said: str, world: World) -> None:
    """Whatever a name is, the server is asked for that name, or not at all."""
    world.answer(world.good)
    assert world.run(said).exit_code == 0
    usual, world.paths = world.paths, []
    for number, name in enumerate(ODD):
        world.out = world.out.parent / f"out{number}"
        result = world.run(said, name=name)
        assert_printable(result)
        quoted = url_path(name).removeprefix("/")
        wanted = ["/".join(quoted if part == "a" else part for part in path.split("/")) for path in usual]
        assert world.paths == ([] if result.exit_code else wanted)
        world.paths = []
    for name in REFUSED:
        result = world.run(said, name=name)
        assert_told(result, said)
        assert [path for path in world.paths if path != "/adapters"] == []


@pytest.mark.parametrize("said", ["rm", "pull"])
@pytest.mark.parametrize("name", NO_VERSION)
def test_what_is_no_version_is_not_the_task(said: str, name: str, world: World) -> None:
    """An `@` with nothing or no number behind it, or without a task before it, is refused before anyone is asked."""
    world.answer(world.good)
    assert_told(world.run(said, name=name), said)
    assert world.paths == []


GARBAGE: dict[str, Handler] = {
    "text": lambda _: httpx2.Response(200, text=f"<html>{EVIL[:-1]}"),
    "nothing": lambda _: httpx2.Response(200),
    "another's object": lambda _: httpx2.Response(200, json={"detail": "hello"}),
    "a list": lambda _: httpx2.Response(200, json=[1]),
    "a deep list": lambda _: httpx2.Response(200, text="[" * 100_000),
    "an error that is another's": lambda _: httpx2.Response(502, json={"message": "bad gateway"}),
    "an error of a list": lambda _: httpx2.Response(502, json=[]),
    "an error of text": lambda _: httpx2.Response(502, text="bad"),
    "an error that a terminal obeys": lambda _: httpx2.Response(404, json={"error": {"message": EVIL}}),
    "a redirect": lambda _: httpx2.Response(302, headers={"location": "/"}),
    "half a gzip": lambda _: httpx2.Response(200, content=b"\x1f\x8b", headers={"content-encoding": "gzip"}),
    "a wrong task": lambda _: httpx2.Response(200, json={**TASK, "versions": [{"version": "x"}], "keys": [1]}),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_server_of_ours_is_a_sentence(kind: str, world: World) -> None:
    """No command ends by an exception, leaves anything, or believes that it is done, whatever answers it."""
    world.answer(GARBAGE[kind])
    for said in WORDS:
        assert_told(world.run(said), said)
        assert not [*world.out.iterdir()]


def _with_artifact(world: World, body: bytes, request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, content=body) if "artifact" in request.url.path else world.good(request)


def test_a_zip_that_is_cut_leaves_nothing(world: World) -> None:
    """A download that is no whole zip, or cannot be kept, is told and leaves no folder; the next one succeeds."""
    for body in (b"no zip", zipped(read_files(world.folder))[:-30], zipped({"a": b"1"}).replace(b"1", b"2")):
        world.answer(partial(_with_artifact, world, body))
        assert_told(world.run("pull"), "pull")
        assert not [*world.out.iterdir()]
    world.answer(world.good)
    (world.out / "file").write_text("")
    here, world.out = world.out, world.out / "file"
    assert_told(world.run("pull"), "pull")
    world.out = here / "new" / "deep"
    assert world.run("pull").exit_code == 0 and [*world.out.iterdir()] == [world.out / "out"]


def test_pages_that_do_not_go_on_end(world: World) -> None:
    """A list of tasks whose pages go round is refused."""
    world.answer(lambda _: httpx2.Response(200, json={"tasks": [TASK], "next": "a"}))
    result = CliRunner().invoke(APP, ["tasks", "--url", "http://h"])
    assert_told(result, "tasks")


@pytest.mark.parametrize("said", WORDS)
def test_every_answer_can_be_had_as_json(said: str, world: World) -> None:
    """With `--json` a command prints one JSON object and nothing else on standard output."""
    world.answer(world.good)
    result = world.run(said, "--json")
    assert result.exit_code == 0 and isinstance(json.loads(result.stdout), dict), result.output
    assert "\n" not in result.stdout.strip()


@pytest.mark.parametrize("said", WORDS)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_no_terminal_obeys_a_server(said: str, more: list[str], world: World) -> None:
    """Nothing that a server answers reaches the terminal as what it obeys."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        found = world.good(request)
        is_json = found.headers.get("content-type") == "application/json"
        return httpx2.Response(found.status_code, text=json.dumps(evil(found.json()))) if is_json else found

    world.answer(answer)
    result = world.run(said, *more)
    assert result.exit_code == 0, result.output
    assert_printable(result)


IMPOSSIBLE = ["http://127.0.0.1:9", "nowhere", "http://", "http://[", "http://\x1b", f"http://{'a' * 70}"]


@pytest.fixture
def cut() -> Iterator[str]:
    """The URL of a server that closes each connection in the middle of its answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**16)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_that_is_absent_or_leaves_is_a_sentence(world: World, cut: str) -> None:
    """A server that cannot be reached, closes early, or whose URL cannot be one ends a command with a sentence."""
    for said in WORDS:
        for url in (cut, *(IMPOSSIBLE if said in ("rm", "push") else IMPOSSIBLE[:1])):
            assert_told(world.run(said, url=url), said)
            assert not [*world.out.iterdir()]
