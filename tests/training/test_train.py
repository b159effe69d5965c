"""The command train: from a file to an artifact that PEFT opens and the server takes, or a sentence and nothing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.format.folder import Artifact, read_folder
from adapters_store.format.manifest import GenerationDefaults
from adapters_store.methods.compile import compile_patch
from server.core import Row, RunnerConfig, Sampling
from server.model.runner import load
from tests.training import conftest
from tests.training.conftest import TEMPLATE, WORDS
from training.data.batch import label_logits
from training.data.files import digest_of
from training.run import trainer

EXAMPLES = Path(__file__).parents[2] / "adapters_store" / "examples"
BLOCKS = list(range(8))
NUM_PARAMETERS = 94_912  # of the tiny llama
LORA = ("--layers", "all", "--r", 4)


def flags(base: Path, data: Path, out: Path, *more: object) -> list[object]:
    """Return the flags of a small LoRA."""
    return conftest.flags(base, data, out, *LORA, *more)


def assert_parity(artifact: Artifact, base: Path) -> None:
    """The server's own forward gives every case's logits within 1e-3, and its continuation, token for token."""
    assert artifact.manifest is not None and len(artifact.manifest.parity) == 8
    config = RunnerConfig(folder=str(base), name="base", precision="fp32", num_threads=1, kv_cache_bytes=2**24)
    loaded = load(config)
    assert artifact.manifest.base.identity == loaded.spec.identity
    patch = compile_patch(artifact, loaded.spec)
    slot, virtual = (
        loaded.adapter_slots.insert(loaded.adapter_slots.pack(patch)),
        list(range(-1, -1 - patch.num_virtual, -1)),
    )
    for case in artifact.manifest.parity:
        tokens = list(case.prompt_token_ids)
        for i, expected in enumerate(case.continuation):
            [sampled] = loaded.runner.run(
                [
                    Row(
                        [*virtual, *tokens],
                        0,
                        BLOCKS,
                        adapters=((slot, 1.0),),
                        sampling=Sampling(),
                        history=tokens,
                        num_prompt=len(tokens),
                        num_virtual=len(virtual),
                    )
                ]
            )
            if i == 0:
                logits = [loaded.runner.last_logits[0, token].item() for token, _ in case.top]
                assert logits == pytest.approx([logit for _, logit in case.top], abs=1e-3)
            assert sampled is not None and sampled.token == expected
            tokens = [*tokens, expected]


def test_it_learns_and_writes_an_artifact(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """The loss falls, the adapter scores better than the base, and its manifest says what was done with what."""
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 60, "--lr", 0.01))
    assert result.exit_code == 0, result.output
    artifact = read_folder(tmp_path / "out")
    assert artifact.manifest is not None
    scores = artifact.manifest.evaluation
    assert scores["after"]["exact_match"] > 0.9 > scores["before"]["exact_match"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    training = artifact.manifest.training
    assert training["steps"] == 60 and training["num_rows"] == 40 and training["peak_memory_bytes"] > 0
    trained = sum(tensor.numel() for tensor in artifact.tensors.values())
    assert training["trained_parameters"] == trained


def test_peft_opens_it_and_the_server_serves_what_was_trained(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any
) -> None:
    """PEFT gives the parity's logits, and so does the server's own forward, within 1e-3, and the same continuation."""
    command(*flags(tiny_base, data, tmp_path / "out", "--steps", 20, "--lr", 0.01, "--save-dtype", "fp16"))
    artifact = read_folder(tmp_path / "out")
    assert artifact.manifest is not None and len(artifact.manifest.parity) == 8
    assert_parity(artifact, tiny_base)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "out")
    case = artifact.manifest.parity[0]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([case.prompt_token_ids])).logits[0, -1]
    assert [token for token, _ in case.top] == logits.topk(len(case.top)).indices.tolist()


def test_a_chat_turn_renders_to_the_prompt_of_training(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any
) -> None:
    """The manifest's prompt format puts a user's turn as training saw it."""
    command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1))
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.prompt_format is not None and manifest.prompt_format.lead == " "
    assert manifest.generation == GenerationDefaults(temperature=0.0)
    assert "".join(text for text, _ in manifest.prompt_format.parts([("user", "red 1")])) == "Colour: red 1\nFeel:"


@pytest.mark.parametrize("name", ["banking77", "restaurants", "sentiment"])
def test_examples_say_how_they_are_answered(name: str) -> None:
    """The examples' manifests have the lead, the end and the sampling that `train` writes for their template."""
    manifest = read_folder(EXAMPLES / name).manifest
    assert manifest is not None and manifest.prompt_format is not None
    assert (manifest.prompt_format.lead, manifest.ends) == (" ", [2])
    assert manifest.generation == GenerationDefaults(temperature=0.0)


def test_the_same_seed_gives_the_same_weights(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """Two runs of one seed write equal tensors; another seed does not."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(*flags(tiny_base, data, tmp_path / name, "--steps", 5, "--seed", seed)).exit_code == 0
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_csv_columns_and_held_out_rows(tiny_base: Path, tmp_path: Path, command: Any) -> None:
    """A CSV's columns are named by flags, and without --eval a part is held out."""
    file = tmp_path / "data.csv"
    file.write_text("text,label\n" + "".join(f"{word} {i},{feel}\n" for word, feel in WORDS.items() for i in range(5)))
    chosen = ["--base", tiny_base, "--data", file, "--out", tmp_path / "out", "--steps", 2, "--layers", "all"]
    result = command(*chosen, "--prompt-column", "text", "--completion-column", "label", "--template", TEMPLATE)
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.training["num_rows"] == 18


def test_parity_of_few_rows_takes_prompts_of_both_sets(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any
) -> None:
    """Parity has eight different prompts of mixed length, also if there is one row to score on."""
    one = tmp_path / "eval.jsonl"
    one.write_text('{"prompt": "red 1", "completion": "warm"}\n' * 2)
    assert command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1), "--eval", one).exit_code == 0
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None
    prompts = [case.prompt_token_ids for case in manifest.parity]
    assert len({tuple(prompt) for prompt in prompts}) == 8 and len({len(prompt) for prompt in prompts}) > 2
    assert all(len(case.top) == 20 and 0 < len(case.continuation) <= 16 for case in manifest.parity)


BAD = {
    "not json": ('{"prompt": "a", "completion": "b"}\nnonsense\n', "line 2 is not JSON"),
    "missing column": ('{"prompt": "a"}\n', "line 1 has no column 'completion'"),
    "empty completion": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": " "}\n', "line 2"),
    "one class": ('{"prompt": "a", "completion": "b"}\n' * 3, "nothing to learn"),
    "no rows": ("\n", "no rows"),
    "too long": (json.dumps({"prompt": "a" * 2000, "completion": "b"}) + "\n", "over the limit of 1024"),
    "not text": ('{"prompt": "a", "completion": 3}\n', "line 1: 'completion' must be text, not 3"),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
        "line 1: the last",
    ),
    "no turns": ('{"messages": "a"}\n', "line 1: turns must be a list"),
    "half a character": ('{"prompt": "\\ud800", "completion": "b"}\n', "line 1: 'prompt' holds half of a character"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_a_sentence_that_names_the_line(kind: str, tiny_base: Path, tmp_path: Path, command: Any) -> None:
    """Data that cannot be trained on is one sentence that names its line, exit code 1, and no artifact."""
    text, sentence = BAD[kind]
    (tmp_path / "data.jsonl").write_text(text)
    plain = ["--template", ""] if "messages" in text else []
    result = command(*flags(tiny_base, tmp_path / "data.jsonl", tmp_path / "out", "--steps", 1, *plain))
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())
    assert not list(tmp_path.glob("*out*"))


def test_a_csv_line_is_named_as_an_editor_counts(tiny_base: Path, tmp_path: Path, command: Any) -> None:
    """Blank lines and cells that span lines count; a line separator of Unicode inside a cell does not end the row."""
    file = tmp_path / "data.csv"
    file.write_text('prompt,completion\na\u2028b,x\n\n"c\nd",y\n\ne,\n')
    result = command(*flags(tiny_base, file, tmp_path / "out", "--steps", 1))
    assert "data.csv line 7: 'completion' is empty" in " ".join(result.output.split())


def test_a_sentence_shows_names_with_brackets(tiny_base: Path, tmp_path: Path, command: Any) -> None:
    """A name that looks like markup of the console is shown as it is."""
    result = command(*flags(tiny_base, tmp_path / "[/bold]" / "data.jsonl", tmp_path / "out"))
    assert result.exit_code == 1 and "[/bold]/data.jsonl" in result.output


def test_rows_of_one_answer_can_be_evaluated_on(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """Rows of one class are too few to learn from, but not to score on."""
    rows = tmp_path / "eval.jsonl"
    rows.write_text('{"prompt": "red 1", "completion": "warm"}\n' * 2)
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1), "--eval", rows)
    assert result.exit_code == 0, result.output


def test_a_row_longer_than_the_base_can_read_is_refused(tiny_base: Path, tmp_path: Path, command: Any) -> None:
    """--max-length cannot raise the limit over the base's own positions."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 1100, "completion": "b"}) + "\n" + '{"prompt":"a","completion":"c"}\n')
    result = command(*flags(tiny_base, file, tmp_path / "out", "--steps", 1, "--max-length", 4096))
    assert result.exit_code == 1 and "over the limit of 1024" in " ".join(result.output.split())


def test_a_run_takes_at_least_one_step(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """However short the time."""
    result = command(*flags(tiny_base, data, tmp_path / "out", "--max-seconds", 1e-9))
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.training["steps"] == 1


def test_out_replaces_an_artifact_and_nothing_else(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """A run replaces the artifact of an earlier one; a folder that holds other things beside one is left alone."""
    chosen = flags(tiny_base, data, tmp_path / "out", "--steps", 1)
    assert command(*chosen).exit_code == 0 and command(*chosen, "--seed", 1).exit_code == 0
    precious = tmp_path / "out" / "notes.txt"
    precious.write_text("mine")
    result = command(*chosen)
    assert result.exit_code == 1 and "notes.txt" in result.output
    assert precious.read_text() == "mine"


def test_a_loss_that_is_not_a_number_ends_the_run(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is told with the step and the lines of its batch, and no artifact is written."""
    monkeypatch.setattr(trainer, "label_logits", lambda model, batch: label_logits(model, batch) * torch.nan)
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 3))
    assert result.exit_code == 1 and "step 1" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "train.jsonl"])
def test_a_full_disk_leaves_no_half_artifact(
    name: str, tiny_base: Path, data: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk while writing is a sentence, and neither the folder nor a temporary one remains."""

    def full(path: Path, data: bytes) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return real(path, data)

    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1))
    assert result.exit_code == 1 and "No space left" in result.output
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_at_a_checkpoint(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """A disk that is really full (what is written goes to /dev/full) ends the run in a sentence; nothing remains."""
    (tmp_path / ".out.checkpoint.new").symlink_to("/dev/full")
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 2, "--save-steps", 1))
    assert result.exit_code == 1 and "the checkpoint cannot be written" in " ".join(result.output.split())
    assert not list(tmp_path.glob("*out*"))


def test_what_diverged_leaves_no_checkpoint(
    tiny_base: Path, data: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose loss is no number would only fail again: its checkpoint goes with it."""
    calls = list[int]()

    def third_is_nan(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return label_logits(model, batch) * (torch.nan if len(calls) > 2 else 1.0)

    monkeypatch.setattr(trainer, "label_logits", third_is_nan)
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 5, "--save-steps", 1))
    assert result.exit_code == 1 and "step 3" in result.output
    assert not list(tmp_path.glob("*out*"))


def test_log_and_curves_lie_beside_the_artifact(tiny_base: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """The log has a line of JSON a step, with the evaluation loss if it was taken; curves and memory are there too."""
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 6, "--eval-steps", 3))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines if "eval_loss" in line] == [3, 6]
    assert {"loss", "lr", "progress", "seconds", "tokens"} <= lines[0].keys()
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None
    training = manifest.training
    assert training["peak_memory_bytes"] >= training["base_memory_bytes"] > 0
    assert training["trained_share"] == pytest.approx(training["trained_parameters"] / NUM_PARAMETERS, rel=1e-3)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--lr", "0"], "--lr must be"),
        (["--save-steps", "0"], "--save-steps must be"),
        (["--eval-steps", "0"], "--eval-steps must be"),
        (["--precision", "int8"], "--precision must be"),
        (["--bottleneck-size", "8"], "--bottleneck-size is not an option of --method lora, which reads --r, --alpha"),
        (["--method", "nonsense"], "--method nonsense"),
        (["--layers", "9"], "--layers"),
        (["--r", "0"], "--r must be"),
        (["--target-modules", "no_such"], "no_such"),
        (["--base", "no/such/base"], "no/such/base"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_bad_options_are_named(
    more: list[str], sentence: str, tiny_base: Path, data: Path, tmp_path: Path, command: Any
) -> None:
    """An option that cannot be meant is named in one sentence."""
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1), *more)
    assert result.exit_code == 1, result.output
    assert sentence in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "kind", "task", "num_rows", "score", "at_least"),
    [
        ("banking77", "lora", "banking77", 400, "exact_match", 0.9),
        ("sentiment", "prompt_tuning", "vader", 400, "exact_match", 0.75),
        ("restaurants", "beft", "e2e", 449, "bleu", 30.0),
    ],
)
def test_a_shipped_example_is_sound(
    name: str, kind: str, task: str, num_rows: int, score: str, at_least: float, real_base: Path
) -> None:
    """An example is small, comes of the rows beside it, beats the real base, and its parity is the server's."""
    artifact, data = read_folder(EXAMPLES / name), EXAMPLES / "data" / task
    assert artifact.manifest is not None and artifact.manifest.method == kind
    assert sum(file.stat().st_size for file in (EXAMPLES / name).iterdir()) < 6_000_000
    training, scores = artifact.manifest.training, artifact.manifest.evaluation
    assert training["data_sha256"] == digest_of(data / "train.csv") and scores["sha256"] == digest_of(data / "test.csv")
    before, after = scores["before"], scores["after"]
    assert before["num_rows"] == after["num_rows"] == num_rows and after["num_answers"] == (64 if task == "e2e" else 0)
    assert after[score] >= at_least and after["perplexity"] < before["perplexity"] and "forgetting" in scores
    keys = ("bleu", "rouge_l") if task == "e2e" else ("exact_match", "label_accuracy")
    assert all(after[key] > before[key] + 0.05 for key in keys)
    command = (EXAMPLES / "README.md").read_text().split(f"--out adapters_store/examples/{name}")[0].split("```")[-1]
    plan = training["plan"]
    assert f"--steps {plan['steps']} --seed {plan['seed']}" in command and f"data/{task}/train.csv" in command
    assert_parity(artifact, real_base)
