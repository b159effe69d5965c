"""Many jobs in one batch: each ends as it would alone, and none touches another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from adapters_store.format.folder import WEIGHTS, read_folder, write_folder
from adapters_store.format.manifest import Manifest
from tests.training.conftest import TEMPLATE
from training.evaluation.evaluate import score
from training.joint import run, shared_base
from training.run import artifact, trainer
from training.run.artifact import write_artifact
from training.run.pipeline import SCORING_BASE

NEAR = 1e-4


def shared(base: Path, data: Path, **more: Any) -> dict[str, Any]:
    """Return the options that jobs have in common."""
    return {
        "base": str(base),
        "data": str(data),
        "eval": str(data),
        "template": TEMPLATE,
        "batch_size": 4,
        "lr": 0.01,
        **more,
    }


def write(file: Path, defaults: dict[str, Any], jobs: list[dict[str, Any]]) -> Path:
    file.write_text(yaml.safe_dump({"defaults": defaults, "jobs": jobs}))
    return file


def flags(job: dict[str, Any]) -> list[object]:
    """Return the flags of a job alone."""
    return [
        word
        for key, value in job.items()
        for word in ([f"--{key.replace('_', '-')}", value] if value is not True else [f"--{key.replace('_', '-')}"])
    ]


def manifest(folder: Path) -> Manifest:
    found = read_folder(folder).manifest
    assert found is not None
    return found


def assert_as_alone(together: Path, alone: Path) -> None:
    """The same weights, losses and scores."""
    ours, theirs = load_file(together / WEIGHTS), load_file(alone / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < NEAR
    assert max(tensor.abs().max().item() for tensor in theirs.values()) > 100 * NEAR
    logs = [(folder / "train.jsonl").read_text().splitlines() for folder in (together, alone)]
    for ours_line, theirs_line in zip(*logs, strict=True):
        ours_step, theirs_step = json.loads(ours_line), json.loads(theirs_line)
        for key in ("number", "lr", "tokens"):
            assert ours_step[key] == theirs_step[key]
        for key in ("loss", "eval_loss"):
            assert ours_step.get(key) == pytest.approx(theirs_step.get(key), abs=NEAR)
    assert manifest(together).training["kept_step"] == manifest(alone).training["kept_step"]
    assert manifest(together).evaluation["after"]["exact_match"] == manifest(alone).evaluation["after"]["exact_match"]


def test_each_job_ends_as_alone(tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """Weights, losses and scores of each job are those of the same flags alone, within 1e-4.

    They differ in data, method, rank, targets, rate, seed, dropout, rows at a time, accumulation and what ends them.
    """
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"{'long ' * (i % 9)}{i}", "completion": "odd" if i % 2 else "even"} for i in range(30)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = tmp_path / "held.jsonl"  # other answers than are trained, so that early stopping has something to do
    held.write_text('{"prompt": "red 1", "completion": "none"}\n{"prompt": "blue 2", "completion": "what"}\n')
    jobs: list[dict[str, Any]] = [
        {"r": 4, "layers": "all", "steps": 6, "dropout": 0.2, "lr": 0.02, "form": "labels"},
        {"target_modules": "q_proj,down_proj", "alpha": 3, "seed": 3, "steps": 9, "use_rslora": True},
        {"method": "bottleneck", "placement": "houlsby", "ln_before": True, "epochs": 0.5, "dropout": 0.1},
        {"method": "bottleneck", "placement": "parallel", "data": str(other), "batch_size": 3, "steps": 5, "seed": 1},
        {"eval": str(held), "lr": 0.05, "steps": 90, "eval_steps": 2, "early_stopping_patience": 2},
        {"gradient_accumulation_steps": 3, "batch_size": 2, "steps": 4, "method": "dora"},
    ]
    jobs = [{**job, "out": str(tmp_path / f"together-{i}")} for i, job in enumerate(jobs)]
    defaults = shared(tiny_base, data)
    result = command("--jobs", write(tmp_path / "jobs.yaml", defaults, jobs))
    assert result.exit_code == 0, result.output
    for i, job in enumerate(jobs):
        alone = tmp_path / f"alone-{i}"
        result = command(*flags({**defaults, **job, "out": alone}))
        assert result.exit_code == 0, result.output
        assert_as_alone(Path(job["out"]), alone)
        assert manifest(Path(job["out"])).training["num_jobs"] == len(jobs)
    assert [manifest(Path(job["out"])).form is not None for job in jobs] == [True] + [False] * 5
    assert 4 < manifest(tmp_path / "together-4").training["steps"] < 90


def test_a_job_that_is_done_leaves_the_batch(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is done is written while the others go on, and their passes are without its rows."""
    passes, done = list[int](), list[tuple[str, int]]()
    real_backward = shared_base.SharedBase.backward

    def backward(self: Any, pending_steps: Any) -> Any:
        passes.append(len(pending_steps))
        return real_backward(self, pending_steps)

    def noted(job: Any, *more: Any) -> Any:
        done.append((job.out.name, len(passes)))
        return write_artifact(job, *more)

    monkeypatch.setattr(shared_base.SharedBase, "backward", backward)
    monkeypatch.setattr(run, "write_artifact", noted)
    jobs = [{"steps": steps, "out": str(tmp_path / str(steps))} for steps in (4, 1, 3)]
    result = command("--jobs", write(tmp_path / "jobs.yaml", shared(tiny_base, data), jobs))
    assert result.exit_code == 0, result.output
    assert passes == [3, 2, 2, 1]
    assert done == [("1", 1), ("3", 3), ("4", 4)]


def test_the_base_is_scored_once_for_jobs_that_are_scored_on_the_same(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows to score, or other labels to choose among, and it is scored anew."""
    scored = list[int]()

    def counted(model: Any, suite: Any, bar: Any, title: str) -> Any:
        if title == SCORING_BASE:
            scored.append(1)
        return score(model, suite, bar, title)

    monkeypatch.setattr(run, "score", counted)
    held, three_labels = tmp_path / "held.jsonl", tmp_path / "three.jsonl"
    held.write_text('{"prompt": "red 1", "completion": "warm"}\n')
    three_labels.write_text(data.read_text() + '{"prompt": "pink", "completion": "hot"}\n')
    more: list[dict[str, Any]] = [{}, {"seed": 2, "r": 2}, {"eval": str(held)}, {"data": str(three_labels)}, {}]
    jobs = [{**job, "steps": 1, "out": str(tmp_path / str(i))} for i, job in enumerate(more)]
    result = command("--jobs", write(tmp_path / "jobs.yaml", shared(tiny_base, data), jobs))
    assert result.exit_code == 0, result.output
    assert len(scored) == 3
    before = [manifest(Path(job["out"])).evaluation["before"] for job in jobs]
    assert before[0] == before[1] == before[4] != before[2]


def test_a_job_that_breaks_ends_alone(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad data, a loss that is no number and a full disk are told with the job's name; the others end as alone."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\nnonsense\n')
    outs = {name: tmp_path / name for name in ("bad", "diverging", "full", "good")}
    jobs: list[dict[str, Any]] = [{"out": str(out)} for out in outs.values()]
    jobs[0]["data"] = str(bad)
    jobs[1] |= {"lr": 1e30, "save_steps": 1}
    jobs[3]["seed"] = 5

    def unless_full(out: Path, *more: Any) -> None:
        if out == outs["full"]:
            raise OSError(28, "No space left on device")
        write_folder(out, *more)

    monkeypatch.setattr(artifact, "write_folder", unless_full)
    defaults = shared(tiny_base, data, steps=6)
    result = command("--jobs", write(tmp_path / "jobs.yaml", defaults, jobs))
    assert result.exit_code == 1
    printed = " ".join(result.output.split())
    assert f"job 1 ({outs['bad']}): {bad} line 2 is not JSON" in printed
    assert f"job 2 ({outs['diverging']}): The" in printed and "of lines" in printed
    assert f"job 3 ({outs['full']}): {outs['full']} cannot be written: No space left on device" in printed
    assert not any(path.name.startswith((".bad", ".diverging", "bad/", "diverging")) for path in tmp_path.iterdir())
    assert not outs["full"].exists()
    assert command(*flags({**defaults, **jobs[3], "out": tmp_path / "alone"})).exit_code == 0
    assert_as_alone(outs["good"], tmp_path / "alone")


def test_a_job_that_was_killed_goes_on(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--jobs with --resume goes on from each job's checkpoint, to the weights of the unbroken run."""
    defaults = shared(tiny_base, data, steps=6, save_steps=4)
    jobs: list[dict[str, Any]] = [
        {"out": str(tmp_path / "a")},
        {"out": str(tmp_path / "b"), "seed": 1, "method": "bottleneck"},
    ]
    file = write(tmp_path / "jobs.yaml", defaults, jobs)
    real = trainer.Trainer.take

    def take(self: Any, pending: Any, loss: float) -> Any:
        if pending.number == 5:
            raise KeyboardInterrupt
        return real(self, pending, loss)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "take", take)
        assert command("--jobs", file).exit_code != 0
    result = command("--jobs", file, "--resume")
    assert result.exit_code == 0 and result.output.count("going on after step 4") == 2, result.output
    for job in jobs:
        alone = tmp_path / "alone" / Path(job["out"]).name
        assert command(*flags({**defaults, **job, "out": alone})).exit_code == 0
        assert_as_alone(Path(job["out"]), alone)


REFUSED: list[tuple[dict[str, Any], list[dict[str, Any]], list[str], str]] = [
    ({}, [{"rr": 8}], [], "job 1: rr is no flag of `manyhats train`; r is one"),
    ({}, [{}, {"nonsense": 8}], [], "job 2: nonsense is no flag of `manyhats train`, which are data, out"),
    ({"jobs": "x"}, [{}], [], "job 1: jobs is no flag"),
    ({}, [{"r": "many"}], [], "job 1: r cannot be 'many'"),
    ({}, [{"out": "a"}, {}, {"out": "./a"}], [], "job 3 (a) has the out of job 1 (a)"),
    ({}, [{"method": "ia3"}], [], "--method ia3 cannot train beside others: take one of lora,"),
    ({}, [{"method": "nonsense"}], [], "--method nonsense is not known"),
    ({"gradient_checkpointing": True}, [{}], [], "--gradient-checkpointing cannot be used with --jobs"),
    ({}, [{}, {"precision": "bf16"}], [], "--precision bf16, job 1 (out-0) has auto"),
    ({}, [{"batch-size": 0}], [], "job 1 (out-0): --batch-size must be"),
    ({}, [{"bottleneck_size": 4}], [], "job 1 (out-0): --bottleneck-size is not an option of --method lora"),
    ({}, [{"out": None}], [], "job 1 has no out"),
    ({}, [], [], "must hold `jobs:`"),
    ({}, [{}], ["--lr", "1"], "--lr cannot stand beside --jobs: write `lr` into"),
]


@pytest.mark.parametrize(("defaults", "jobs", "more", "sentence"), REFUSED)
def test_what_cannot_be_meant_is_named_before_anything_begins(
    defaults: dict[str, Any],
    jobs: list[dict[str, Any]],
    more: list[str],
    sentence: str,
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistake is one sentence that names the job and the key, and no job is trained."""
    monkeypatch.chdir(tmp_path)
    named = [{"out": f"out-{i}", **job} for i, job in enumerate(jobs)]
    file = write(tmp_path / "jobs.yaml", shared(tiny_base, data, steps=1, **defaults), named)
    result = command("--jobs", file, *more)
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split()), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.yaml"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("jobs: [", "is not YAML"),
        ("jobs: [a]", "job 1 must be keys with values"),
        ("- data: x", "must hold `jobs:`"),
        ("jobs: [{data: x}]", "job 1 has no out"),
        ("jobs: [{data: x, out: y}]\nbase: z", "has 'base' beside defaults and jobs"),
    ],
)
def test_a_file_that_holds_no_jobs_is_named(
    text: str, sentence: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """A fault of the file is told in one sentence."""
    file = tmp_path / "jobs.yaml"
    file.write_text(text)
    result = command("--jobs", file)
    assert result.exit_code == 1 and sentence in " ".join(result.output.split()), result.output


def test_one_job_needs_data_and_out(data: Path, command: Callable[..., Any]) -> None:
    """A missing --out is named, if there is no --jobs."""
    result = command("--data", data)
    assert result.exit_code == 1 and "--out is missing" in " ".join(result.output.split())
