"""Other trainers' names of options: each is answered by a sentence that says what to write here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from training import cli
from training.compare.command import compare
from training.errors import OptionError
from training.joint.job_file import read_jobs
from training.options import flag
from training.other_names import FIXED, FLAGS, hint_for

OWN = set(inspect.signature(cli.train).parameters)
# Command lines and files of the trainers' own documentation, by their options.
RECIPES = {
    "TRL": "model_name_or_path dataset_name learning_rate num_train_epochs packing per_device_train_batch_size"
    " eval_strategy gradient_accumulation_steps gradient_checkpointing eval_steps use_peft lora_r lora_alpha"
    " output_dir",
    "transformers": "model_name_or_path train_file validation_file per_device_train_batch_size do_train do_eval"
    " output_dir learning_rate weight_decay warmup_ratio lr_scheduler_type max_grad_norm bf16 save_total_limit"
    " report_to optim",
    "PEFT": "r lora_alpha lora_dropout target_modules layers_to_transform use_rslora use_dora init_lora_weights"
    " peft_type",
    "axolotl": "base_model datasets sequence_len lora_r lora_alpha lora_dropout num_epochs micro_batch_size optimizer",
    "LLaMA-Factory": "finetuning_type lora_rank lora_target dataset cutoff_len learning_rate warmup_ratio save_steps",
    "MLX": "model fine_tune_type data iters learning_rate adapter_path mask_prompt seed",
    "OpenAI": "training_file validation_file model n_epochs learning_rate_multiplier batch_size suffix seed",
}


def run(command: Any, *words: str) -> Any:
    """Run a command as `manyhats` makes it."""
    return CliRunner().invoke(app_of(command), list(words))


def app_of(command: Any) -> typer.Typer:
    """The app of a command, as `manyhats` makes it."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("train", **command.options)(command)
    return app


def test_the_table_is_sound() -> None:
    """Each name that is answered is none of ours, and each that it is answered by is."""
    assert set(FLAGS.values()) <= OWN and not (FLAGS.keys() | FIXED.keys()) & OWN
    assert not FLAGS.keys() & FIXED.keys()
    for sentence in FIXED.values():
        named = {word.strip(",;").removeprefix("--").replace("-", "_") for word in sentence.split() if word[:2] == "--"}
        assert named <= OWN, sentence


@pytest.mark.parametrize("trainer", RECIPES)
def test_every_name_of_a_recipe_is_ours_or_answered(trainer: str) -> None:
    """Each option of another trainer's recipes is an option here, or a sentence names the one that means it."""
    for name in RECIPES[trainer].split():
        for typed in (name, name.replace("_", "-")):
            hint = hint_for(typed, OWN)
            assert name in OWN or (hint and typed in hint), (trainer, name)


@pytest.mark.parametrize("typed", ["--learning_rate=1e-4", "--learning-rate", "--lora_r", "--batch_size", "--use_dora"])
def test_the_command_says_what_to_write(typed: str, tmp_path: Path) -> None:
    """The command ends at the first such name with its sentence, before anything is read or written."""
    result = run(cli.train, "--data", "absent.jsonl", "--out", str(tmp_path / "out"), typed, "8")
    name = typed[2:].partition("=")[0]
    hint = hint_for(name, OWN)
    assert result.exit_code == 1 and hint and f"manyhats train: {hint}." in result.output, result.output
    assert flag(FLAGS.get(name.replace("-", "_"), "batch_size" if "batch" in name else "method")) in hint
    assert not list(tmp_path.iterdir())


def test_our_own_names_are_not_touched(tmp_path: Path) -> None:
    """Every flag of ours is read as ever, on both commands; a name that nobody has is unknown."""
    assert not [name for name in OWN if hint_for(name.replace("_", "-"), OWN)]
    assert "learning_rate is" not in run(cli.train, "--data", "x", "--lr", "1", "--help").output
    assert run(cli.train, "--surprise", "1").exit_code == 2
    assert "num_train_epochs is --epochs here" in run(compare, "--num_train_epochs", "1").output
    assert run(compare, "--learning_rate", "1").exit_code == 2, "each method has its own there"


@pytest.mark.parametrize(("key", "says"), [("learning_rate", "lr is one"), ("use_dora", "--method dora")])
def test_a_file_of_jobs_says_it_too(tmp_path: Path, key: str, says: str) -> None:
    """A key of a job that is another trainer's name is answered by ours."""
    file = tmp_path / "jobs.yaml"
    file.write_text(f"jobs:\n  - {{data: a.jsonl, out: b, {key}: 1}}\n")
    with pytest.raises(OptionError, match=says):
        read_jobs(file, cli.train, without=("jobs",), needed=())


@pytest.mark.parametrize("command", [cli.train, compare])
def test_no_option_is_given_twice(command: Any, tmp_path: Path) -> None:
    """Of two values of one option none is dropped: every option with a value is refused where it stands twice."""
    parameters: list[Any] = typer.main.get_command(app_of(command)).params
    names = [one.opts[0] for one in parameters if not one.is_flag and not one.multiple and one.opts[0][:2] == "--"]
    assert len(names) > 20
    for name in names:
        result = run(command, name, "1", f"{name}=1")
        assert result.exit_code == 1 and f"{name} is given twice" in result.output, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs: [{data: a.csv, out: b, lr: 1, lr: 2}]", "the key 'lr' appears twice"),
        ("jobs: [{data: a.csv, out: b, batch-size: 1, batch_size: 2}]", "'batch-size' and 'batch_size'"),
        ("jobs: [{data: a.csv, out: b}]\njobs: []", "the key 'jobs' appears twice"),
    ],
)
def test_no_key_of_a_file_of_jobs_stands_twice(text: str, said: str, tmp_path: Path) -> None:
    """Nor is one of two values of a key in a file of jobs."""
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(OptionError) as error:
        read_jobs(tmp_path / "jobs.yaml", cli.train, without=("jobs",), needed=("data", "out"))
    assert said in str(error.value)
