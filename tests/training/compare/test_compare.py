"""Methods compared: trained apart, served by the real engine, written as they come; mistakes are told at once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from adapters_store.format.folder import MANIFEST
from tests.training.conftest import TEMPLATE
from training.compare import comparing, runs, serving
from training.compare.command import compare
from training.compare.runs import MethodError, News, train_apart
from training.data.dataset import Columns
from training.data.template import Template
from training.errors import DataError
from training.evaluation.evaluate import Scores
from training.run.job import Job
from training.run.schedule import Plan

SCORES = Scores(40, 0.0, 0.5, 900.0, 0, None, None, 20.0)


def run(base: Path, data: Path, out: Path, *more: object) -> Any:
    """`manyhats compare` in this process."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compare)
    common = ["--base", base, "--data", data, "--eval", data, "--out", out, "--template", TEMPLATE, "--batch-size", 10]
    return CliRunner().invoke(app, [str(word) for word in [*common, *more]], terminal_width=200)


def printed(result: Any) -> str:
    """Its output on one line."""
    return " ".join(result.output.split())


@pytest.mark.timeout(600)  # a server that is the first of its version compiles its kernels
def test_methods_are_trained_apart_and_served(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """Real processes, a real server: what trained has its figures, what failed its reason, and all of it is written."""
    out = tmp_path / "out"
    result = run(tiny_base, data, out, "--methods", "prefix_tuning,lora", "--steps", 3, "--gradient-checkpointing")
    assert result.exit_code == 0, result.output
    assert "prefix_tuning failed: --gradient-checkpointing cannot be used with a prefix" in printed(result)
    found = json.loads((out / "compare.json").read_text())
    assert [*found["failed"]] == ["prefix_tuning"]
    [lora] = found["outcomes"]
    assert lora["method"] == "lora" and lora["steps"] == 3 and lora["trained_parameters"] > 0
    assert lora["memory_bytes"] > 0 and lora["artifact_bytes"] > 0
    assert lora["serving"]["share_of_base"] > 0 and lora["serving"]["slot_bytes"] > 0
    table = (out / "compare.md").read_text()
    assert "--methods prefix_tuning,lora --data" in table and "--gradient-checkpointing" in table
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def scored() -> list[Job]:
    """The jobs whose base was scored."""
    return []


@pytest.fixture
def trained(tiny_base: Path, command: Callable[..., Any], monkeypatch: Any, scored: list[Job]) -> list[Job]:
    """The jobs that were trained, in this process; no server is started."""
    jobs = list[Job]()

    def train_here(job: Job, _before: Scores, on_news: Callable[[News], None]) -> None:
        jobs.append(job)
        on_news(News("step 1", 1.0))
        words = [
            "--base",
            job.base,
            "--data",
            job.data,
            "--eval",
            job.eval,
            "--out",
            job.out,
            "--steps",
            job.plan.steps,
        ]
        assert command(*words, "--method", job.method, "--template", TEMPLATE).exit_code == 0

    def score_here(job: Job, _on_news: object) -> Scores:
        scored.append(job)
        return SCORES

    def no_server(*_args: object) -> NoReturn:
        raise serving.ServingError("the server ended with 1")

    monkeypatch.setattr(comparing, "train_apart", train_here)
    monkeypatch.setattr(comparing, "score_apart", score_here)
    monkeypatch.setattr(serving, "start_server", no_server)
    return jobs


def test_what_is_there_is_not_trained_again(trained: list[Job], tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """The same comparison goes on with the methods that are missing; one that was killed is resumed; order is kept."""
    out = tmp_path / "out"
    result = run(tiny_base, data, out, "--steps", 1, "--methods", "lora,full")
    assert result.exit_code == 0 and "nothing is served: the server ended with 1" in printed(result)
    table = (out / "compare.md").read_text()
    assert "* `lora` is not served: the server ended with 1\n\n* `full` is not served: it is a new base" in table
    manifest = (out / "lora" / MANIFEST).read_bytes()
    (out / ".bitfit.checkpoint").write_bytes(b"")
    trained.clear()
    assert run(tiny_base, data, out, "--steps", 1, "--methods", "ia3,lora").exit_code == 0
    assert [(job.method, job.is_resumed) for job in trained] == [("ia3", False)]
    assert (out / "lora" / MANIFEST).read_bytes() == manifest
    found = json.loads((out / "compare.json").read_text())
    assert [one["method"] for one in found["outcomes"]] == ["ia3", "lora"]
    run(tiny_base, data, out, "--steps", 1, "--methods", "bitfit")
    assert trained[-1].is_resumed


def test_the_base_is_scored_once(
    trained: list[Job], scored: list[Job], tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """The base is scored once for all methods, and not again if the comparison goes on."""
    for methods in ("lora,full", "lora,full,ia3"):
        assert run(tiny_base, data, tmp_path / "out", "--steps", 1, "--methods", methods).exit_code == 0
    assert [job.method for job in trained] == ["lora", "full", "ia3"] and [job.method for job in scored] == ["lora"]


def test_another_comparison_is_refused(trained: list[Job], tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """A folder of other options, of other rows, or of other things is left alone; the sentence names what differs."""
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_bytes(data.read_bytes())
    assert run(tiny_base, rows, out, "--steps", 1, "--methods", "lora").exit_code == 0
    assert "--steps was 1" in printed(run(tiny_base, rows, out, "--steps", 2, "--methods", "lora"))
    rows.write_bytes(data.read_bytes() + b'{"prompt": "x", "completion": "warm"}\n')
    assert "the rows of --data was" in printed(run(tiny_base, rows, out, "--steps", 1, "--methods", "lora"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is no comparison" in printed(run(tiny_base, rows, tmp_path / "mine", "--steps", 1, "--methods", "lora"))
    assert len(trained) == 1


def test_one_that_fails_does_not_stop_the_others(
    trained: list[Job], tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that fails is a line with the reason; if all fail, the command fails with all of the reasons."""
    real = vars(comparing)["train_apart"]  # of `trained`, in the place of the true one

    def fail(job: Job, before: Scores, on_news: Callable[[News], None]) -> None:
        if job.method != "ia3":
            raise MethodError("its process was ended by SIGKILL")
        real(job, before, on_news)

    monkeypatch.setattr(comparing, "train_apart", fail)
    result = run(tiny_base, data, tmp_path / "out", "--steps", 1, "--methods", "lora,ia3")
    assert result.exit_code == 0 and "lora failed: its process was ended by SIGKILL" in printed(result)
    assert [job.method for job in trained] == ["ia3"]
    result = run(tiny_base, data, tmp_path / "none", "--steps", 1, "--methods", "lora,full")
    assert result.exit_code == 1
    assert "lora: its process was ended by SIGKILL full: its process was ended by SIGKILL" in printed(result)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--methods", "lora,nonsense"], "--method nonsense is not known"),
        (["--methods", ","], "--methods names no method"),
        (["--steps", 0], "--steps must be"),
        (["--data", "no/such.jsonl"], "Cannot read no/such.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything(
    more: list[object], sentence: str, trained: list[Job], tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """A mistake is told in one sentence, and no folder is made."""
    result = run(tiny_base, data, tmp_path / "out", "--methods", "lora", *more)
    assert result.exit_code == 1 and sentence in printed(result)
    assert not trained and not (tmp_path / "out").exists()


def job_of(base: Path, data: Path, out: Path) -> Job:
    """A LoRA of a few steps."""
    return Job("lora", str(base), data, out, data, Columns(), Template(), {}, Plan(lr=0.01, steps=50))


def test_each_batch_is_held_against_the_base_beside_it(
    trained: list[Job], tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """A machine that grows slower does not change the share; what cannot be served has the server's words."""
    methods = ("lora", "ia3", "bitfit")
    run(tiny_base, data, tmp_path / "out", "--steps", 1, "--methods", ",".join(methods))
    batches = list[str]()

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/health/ready":
            return httpx2.Response(200)
        task = request.url.params["task"]
        if request.url.path == "/adapters":
            content = {"error": {"message": "another base"}} if task == "ia3" else {"slot_bytes": 7}
            return httpx2.Response(422 if task == "ia3" else 201, json=content)
        if task == "bitfit":
            return httpx2.Response(503, json={"error": {"message": "the engine died"}})
        batches.append(task)
        slower = 1.0 + len(batches) // serving.NUM_REQUESTS / 10
        return httpx2.Response(
            200, json={"timing": {"ttft_ms": 5, "total_ms": 5 + 1000 * slower * {"base": 1, "lora": 2}[task]}}
        )

    with httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://test") as client:
        found = serving.measure(client, {name: tmp_path / "out" / name for name in methods}, lambda: None)
    assert found.refused == {
        "ia3": "the server refused it: another base",
        "bitfit": "the server did not answer for bitfit: the engine died",
    }
    assert found.methods["lora"].share_of_base == pytest.approx(0.5, rel=0.05) and found.methods["lora"].slot_bytes == 7
    order = [batches[i] for i in range(0, len(batches), serving.NUM_REQUESTS)]
    assert order == ["base", "lora", "base", *["lora", "base"] * serving.NUM_ROUNDS]
    assert found.server.num_requests == serving.NUM_REQUESTS


class Ear(Connection):
    """A pipe's end that keeps what is sent."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def send(self, thing: object) -> None:
        self.heard.append(thing)


def test_a_run_takes_the_scores_that_it_is_given(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process without them scores the base and tells; one with them trains, and writes them as they are."""
    job, first, second = job_of(tiny_base, data, tmp_path / "out"), Ear(), Ear()
    monkeypatch.setattr(signal, "signal", lambda *_args: None)
    runs._work(job, None, first)
    told = first.heard[-1]
    assert isinstance(told, Scores) and told.num_rows == 40 and not job.out.exists()
    runs._work(job, SCORES, second)
    evaluation = json.loads((job.out / MANIFEST).read_text())["evaluation"]
    assert evaluation["before"] == dataclasses.asdict(SCORES)
    assert "scoring the base" not in {news.text for news in second.heard if isinstance(news, News)}


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [
        ('{"prompt": "a"}\n', {}, DataError),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}\n', {"layers": "9"}, MethodError),
    ],
)
def test_what_is_wrong_with_rows_is_wrong_for_every_method(
    rows: str,
    options: dict[str, Any],
    error: type[Exception],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process tells an error of the data as such, which ends the comparison, and every other as the method's."""
    file, ear = tmp_path / "rows.jsonl", Ear()
    file.write_text(rows)
    monkeypatch.setattr(signal, "signal", lambda *_args: None)
    runs._work(dataclasses.replace(job_of(tiny_base, file, tmp_path / "out"), options=options), SCORES, ear)
    assert type(ear.heard[-1]) is error
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_is_told(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """The system may end a process, for want of memory: the reason is the signal."""

    def kill(_news: News) -> None:
        [process] = multiprocessing.active_children()
        process.kill()

    with pytest.raises(MethodError, match="ended by SIGKILL"):
        train_apart(job_of(tiny_base, data, tmp_path / "out"), SCORES, kill)
