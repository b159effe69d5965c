"""Scores: what one forward pass says of a model, its free answers, and how like references they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.format.folder import read_folder
from tests.kit.tiny import EOS, VOCAB_SIZE, make_tiny_base
from tests.training.conftest import flags
from training.base import Base, load_base
from training.data.dataset import Columns, Dataset, Example, TokenizedRow, TrainingData
from training.evaluation.choices import choices_of
from training.evaluation.evaluate import evaluate
from training.evaluation.generate import answer
from training.evaluation.suite import suite_of
from training.evaluation.text_metrics import bleu, rouge_l
from training.methods import METHODS, attach, options_of
from training.run.manifest import split_digest

ENDS = frozenset({EOS})
PROMPTS = [tuple(b"a"), tuple(b"Colour: red"), tuple(b"green or blue?"), tuple(range(60, 100)), tuple(b"b" * 40)]
NUM_TOKENS = 12
SAID = [b"warm", b"cold", b"hot"]
ROWS = [TokenizedRow((*b"Colour: ", 97 + i, 10, *SAID[i % 3], EOS), 10, i + 1) for i in range(18)]


def base_of(folder: Path) -> Base:
    return load_base(str(folder), "cpu", None, lambda _message: None)


def slow_answer(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Token by token, alone and without a cache."""
    tokens: list[int] = []
    while len(tokens) < NUM_TOKENS:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            return tokens[:-1]
    return tokens


def rows_of(train: list[TokenizedRow], held: list[TokenizedRow], folder: Path) -> TrainingData:
    files = [Dataset(folder, (), ""), Dataset(folder, (), "")]
    return TrainingData(files[0], files[1], train, held)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_a_batch_of_answers_is_what_each_gives_alone(kind: str, tmp_path: Path) -> None:
    """Padding, the cache and sliding windows change no token of a greedy answer."""
    model = base_of(make_tiny_base(tmp_path / kind, kind)).model
    found = answer(model, PROMPTS, ENDS, NUM_TOKENS)
    assert found == {prompt: slow_answer(model, prompt) for prompt in PROMPTS}
    assert len({tuple(tokens) for tokens in found.values()}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_every_hat_answers_with_a_cache_as_without(method: str, biased_base: Path) -> None:
    """A trained adapter's free answers are those of its whole forward, virtual tokens included."""
    base = base_of(biased_base)
    adapter = attach(method, options_of(method, {}), base, ROWS, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trained():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    adapter.finalize(torch.float32)
    found = answer(adapter.model.eval(), PROMPTS, ENDS, NUM_TOKENS)
    assert found == {prompt: slow_answer(adapter.model, prompt) for prompt in PROMPTS}


def test_an_answer_ends_at_its_eos(tiny_base: Path) -> None:
    """EOS ends an answer and is none of it, while its neighbours go on."""
    model = base_of(tiny_base).model
    whole = answer(model, PROMPTS, ENDS, NUM_TOKENS)
    end = whole[PROMPTS[1]][3]
    cut = answer(model, PROMPTS, frozenset({EOS, end}), NUM_TOKENS)
    assert cut[PROMPTS[1]] == whole[PROMPTS[1]][: whole[PROMPTS[1]].index(end)]
    assert any(len(cut[prompt]) > len(cut[PROMPTS[1]]) for prompt in PROMPTS)


def test_exact_match_is_of_the_free_answer(tiny_base: Path, tmp_path: Path) -> None:
    """An answer that one teacher-forced pass calls exact is the one that the model writes by itself, to its end."""
    base = base_of(tiny_base)
    prompts = [tuple([65 + i] * (i + 2)) for i in range(6)]
    answers = {prompt: slow_answer(base.model, prompt)[:4] for prompt in prompts}
    rows = [TokenizedRow((*prompt, *tokens, EOS), len(prompt), 0) for prompt, tokens in answers.items()]
    suite = suite_of(rows_of(ROWS, rows, tmp_path), base, 0)
    assert evaluate(base.model, suite).exact_match == 0.0  # the answers go on where the rows end
    bias = torch.zeros(base.model.config.vocab_size)
    base.model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits + bias)
    bias[EOS] = 1e4
    only_eos = [TokenizedRow((*prompt, EOS), len(prompt), 0) for prompt in prompts]
    suite = suite_of(rows_of(ROWS, [*only_eos[:3], *rows[3:]], tmp_path), base, 0)
    assert evaluate(base.model, suite).exact_match == 0.5


def test_labels_are_those_of_the_training_rows(tiny_base: Path, tmp_path: Path) -> None:
    """Label accuracy chooses among the labels that were trained on; an answer that is none of them is wrong."""
    base = base_of(tiny_base)
    known = suite_of(rows_of(ROWS, ROWS, tmp_path), base, 8)
    strange = [TokenizedRow((*row.ids[:10], *b"tepid", EOS), 10, 0) for row in ROWS]
    scores = evaluate(base.model, known)
    assert scores.label_accuracy is not None and scores.label_accuracy > 0.2 and scores.exact_match == 0.0
    assert evaluate(base.model, suite_of(rows_of(ROWS, strange, tmp_path), base, 8)).label_accuracy == 0.0
    assert scores.rouge_l is scores.bleu is None and scores.num_answers == 0
    assert choices_of([TokenizedRow((1, i, EOS), 1, 0) for i in range(9)]) is None


def test_texts_are_written_out_and_compared(tiny_base: Path, tmp_path: Path) -> None:
    """Answers that are no labels are scored by ROUGE-L and BLEU; of a prompt's several references the best counts."""
    base = base_of(tiny_base)
    prompts = [tuple(f"prompt {i}".encode()) for i in range(6)]
    answers = answer(base.model, prompts, ENDS, NUM_TOKENS)
    mine = [TokenizedRow((*prompt, *answers[prompt], EOS), len(prompt), 0) for prompt in prompts]
    other = [TokenizedRow((*prompt, *b"nothing like it at all", EOS), len(prompt), 0) for prompt in prompts]
    scores = evaluate(base.model, suite_of(rows_of(mine, [*other, *mine], tmp_path), base, 4))
    assert scores.num_answers == 4 and scores.label_accuracy is None
    worse = evaluate(base.model, suite_of(rows_of(mine, other, tmp_path), base, 4))
    assert worse.rouge_l is not None and scores.rouge_l is not None and worse.rouge_l < scores.rouge_l


def test_the_neutral_text_is_scored_as_transformers_scores_it(tiny_base: Path, tmp_path: Path) -> None:
    """Its perplexity is that of transformers' own loss over the same windows; of a model that knows nothing, the size
    of the vocabulary."""
    base = base_of(tiny_base)
    suite = suite_of(rows_of(ROWS, ROWS, tmp_path), base, 0)
    loss, count = 0.0, 0
    for row in suite.neutral:
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            loss += base.model(input_ids=ids, labels=ids).loss.item() * (len(row.ids) - 1)
        count += len(row.ids) - 1
    assert count > 3000
    assert evaluate(base.model, suite).neutral_perplexity == pytest.approx(math.exp(loss / count), 1e-4)
    torch.nn.init.zeros_(base.model.model.norm.weight)
    assert evaluate(base.model, suite).neutral_perplexity == pytest.approx(VOCAB_SIZE, 1e-4)


def test_rouge_l_of_known_texts() -> None:
    """The paper's own example, several references, and words of another script."""
    assert rouge_l(["police killed the gunman"], [["police kill the gunman"]]) == pytest.approx(0.75)
    assert rouge_l(["the gunman kill police"], [["police kill the gunman"]]) == pytest.approx(0.5)
    assert rouge_l(["a b", "nothing"], [["c", "A, b!"], ["x"]]) == pytest.approx(0.5)
    assert rouge_l(["кошка спит"], [["кошка не спит"]]) == pytest.approx(0.8)
    assert rouge_l([""], [[""]]) == 0.0


def test_bleu_is_of_a_corpus_with_as_many_references_as_there_are() -> None:
    """sacrebleu's score, where texts have one reference or several."""
    texts = ["the cat sat on the mat today", "it rains again in the hills"]
    assert bleu(texts, [["no", texts[0]], [texts[1]]]) == pytest.approx(100)
    assert bleu(texts[:1], [["the cat sat on the mat", "today the cat sat on the mat"]]) == pytest.approx(84.0896, 1e-4)


def test_scores_are_comparable_on_the_same_rows_and_columns(tmp_path: Path) -> None:
    """A split is the bytes, the lines and the columns; other lines of the same file are another split."""

    def split(lines: list[int], name: str = "a.csv", digest: str = "d", columns: Columns = Columns()) -> str:  # noqa: B008
        examples = tuple(Example((("user", f"p {line}"),), "c", tmp_path / name, line) for line in lines)
        return split_digest(Dataset(tmp_path / name, examples, digest), columns)

    assert split([2, 3]) == split([2, 3], name="b.csv")
    assert len({split([2, 3]), split([2, 4]), split([2, 3], digest="e"), split([2, 3], columns=Columns("text"))}) == 4


def test_the_manifest_has_both_sides(tiny_base: Path, tmp_path: Path, command: Callable[..., Any], data: Path) -> None:
    """Base and adapter are scored on the same rows, texts and neutral text, and the change is written down."""
    file = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"{i} {'yes ' * (i % 4)}no"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(*flags(tiny_base, file, tmp_path / "out", "--steps", 30, "--lr", 0.02, "--num-answers", 9))
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None
    facts = manifest.evaluation
    before, after = facts["before"], facts["after"]
    assert before.keys() == after.keys() and after["num_answers"] == 9
    assert after["rouge_l"] > before["rouge_l"] and after["bleu"] >= before["bleu"] >= 0
    assert facts["forgetting"] == pytest.approx(after["neutral_perplexity"] / before["neutral_perplexity"] - 1, 1e-3)
    assert "ROUGE-L" in result.output and "neutral" in result.output
