"""A row's angles are its own: no other row of a step, no chunk and no step before changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import training.base
from adapters_store.base.rotary import fix_rotary
from server.core import Row, RunnerConfig, Sampling
from server.model import load as loading
from server.model.errors import UnsupportedBaseError
from server.model.runner import Loaded, load
from tests.kit.tiny import make_tiny_base
from training.errors import OptionError

BORDER, LONGEST, BLOCK = 48, 192, 16
HALF = 8  # dimensions of a head of the tiny bases, halved
YARN = {"factor": 4.0, "original_max_position_embeddings": BORDER}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},  # grows from what the config names as its longest, which is never crossed here
    "yarn": YARN,
    "llama3": {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**YARN, "short_factor": [1.0] * HALF, "long_factor": [1.0 + at for at in range(HALF)]},
}
CHANGING = {"dynamic", "longrope"}


def make_base(folder: Path, kind: str, model_type: str) -> Path:
    """A tiny base with a kind of rotary embedding whose factors change at `BORDER`, if any do."""
    rope = {"rope_type": kind, "rope_theta": 100.0, **KINDS[kind]}
    longest = BORDER if kind == "dynamic" else LONGEST
    changes: dict[str, Any] = {"max_position_embeddings": longest, "rope_parameters": rope}
    if model_type == "phi3":
        changes["original_max_position_embeddings"] = BORDER
    if model_type == "gemma3_text":  # a kind for each type of layer
        plain = {"rope_type": "default", "rope_theta": 100.0}
        changes["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain}
    return make_tiny_base(folder, model_type, **changes)


def load_one(folder: Path, max_tokens: int | None = None) -> Loaded:
    name, room = folder.name, 2**24
    return load(
        RunnerConfig(
            folder=str(folder), name=name, precision="fp32", num_threads=1, kv_cache_bytes=room, block_size=BLOCK,
            max_sequence_tokens=max_tokens,
        )
    )  # fmt: skip


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(loaded: Loaded, *prompts: list[int], chunk: int = LONGEST) -> list[Tensor]:
    """The last logits of each prompt, computed side by side in chunks."""
    last: list[Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, max(map(len, prompts)), chunk):
        rows, whose = [], []
        for index, tokens in enumerate(prompts):
            part = tokens[start : start + chunk]
            if part:
                blocks = list(range(index * LONGEST // BLOCK, (index + 1) * LONGEST // BLOCK))
                rows.append(Row(part, start, blocks, (), Sampling()))
                whose.append(index)
        loaded.runner.run(rows)
        for index, logits in zip(whose, loaded.runner.last_logits, strict=True):
            last[index] = logits.clone()
    return last


BASES = [*((kind, "llama") for kind in KINDS), ("longrope", "phi3"), ("dynamic", "gemma3_text")]


@pytest.fixture(params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    kind, model_type = request.param
    return kind, make_base(tmp_path / f"{kind}-{model_type}", kind, model_type)


def test_every_kind_of_transformers_is_tried() -> None:
    """The kinds above are all that transformers knows, but the one that only Gemma 4 has."""
    assert {*KINDS} == {*ROPE_INIT_FUNCTIONS, "default"} - {"proportional"}


def test_a_row_beside_a_longer_one(base: tuple[str, Path]) -> None:
    """A short row has the same logits alone, beside one beyond the border, and after that one; whole and in chunks."""
    loaded = load_one(base[1])
    short, long = prompt(20, 1), prompt(loaded.max_sequence_tokens - 1, 2)
    (alone,) = run(loaded, short)
    (whole,) = run(loaded, long)
    assert torch.equal(run(loaded, short, long)[0], alone)
    assert torch.equal(run(loaded, long, short)[1], alone)
    assert torch.equal(run(loaded, short)[0], alone)
    for chunk in (1, 7, BORDER):
        assert torch.equal(run(loaded, long, short, chunk=chunk)[0], whole)


def test_the_answers_are_transformers_own(base: tuple[str, Path]) -> None:
    """Short and long rows have the logits of the stock model with the factors of the longest sequence."""
    kind, folder = base
    loaded, stock = load_one(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    longest = loaded.max_sequence_tokens
    assert fix_rotary(stock, longest).split(" ")[0] == (kind if kind in CHANGING else "")
    for length in (20, longest - 1):
        tokens = prompt(length, 3)
        with torch.inference_mode():
            wanted = stock(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(run(loaded, tokens)[0], wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_the_longest_sequence_chooses_the_factors(tmp_path: Path, model_type: str) -> None:
    """If no sequence may cross the border, the factors are those of short ones, which the stock model has there too."""
    folder = make_base(tmp_path / "base", "longrope", model_type)
    stock, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompt(20, 4)
    with torch.inference_mode():
        wanted = stock(torch.tensor([tokens])).logits[0, -1]
    short, long = load_one(folder, BORDER), load_one(folder)
    assert (short.max_sequence_tokens, long.max_sequence_tokens) == (BORDER, LONGEST)
    torch.testing.assert_close(run(short, tokens)[0], wanted, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(run(long, tokens)[0], wanted, atol=2e-2)


def test_a_trainer_has_the_same_factors(base: tuple[str, Path]) -> None:
    """A trainer's base has the logits of the server's for rows on either side of the border, and names its choice."""
    kind, folder = base
    for max_tokens in (BORDER, None):
        served = load_one(folder, max_tokens)
        longest = served.max_sequence_tokens
        trained = training.base.load_base(str(folder), "cpu", None, lambda _line: None, [longest])
        assert trained.rotary == served.forward.rotary
        assert bool(trained.rotary) == (kind in CHANGING)
        for length in (20, longest - 1):
            tokens = prompt(length, 5)
            with torch.inference_mode():
                logits = trained.model(torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(run(served, tokens)[0], logits, atol=2e-3, rtol=2e-3)


def test_jobs_that_choose_different_factors_cannot_share_a_base(tmp_path: Path) -> None:
    """Jobs with rows on either side of a border are refused together; each of them alone has its own factors."""
    folder = str(make_base(tmp_path / "base", "longrope", "llama"))
    with pytest.raises(OptionError, match=f"longrope over {BORDER} tokens, longrope up to {BORDER} tokens"):
        training.base.load_base(folder, "cpu", None, lambda _line: None, [BORDER, BORDER + 1])


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_base_that_looks_at_its_neighbours_is_refused(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose factors still change with the largest position of a call is refused with a sentence."""
    monkeypatch.setattr(loading, "fix_rotary", lambda *_: "")
    with pytest.raises(UnsupportedBaseError, match="depends on the largest position of a call"):
        load_one(make_base(tmp_path / "base", "longrope", model_type))


@pytest.mark.parametrize("keeps", [False, True])
def test_an_unknown_kind_of_dependence_is_refused(tmp_path: Path, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that nobody has written yet: by the largest position of this call, or of any call before."""
    stock, seen = LlamaRotaryEmbedding.forward, [0]

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(position_ids.max()))
        cos, sin = stock(self, x, position_ids)
        return (cos * 1.01, sin) if max(seen if keeps else seen[-1:]) >= BORDER else (cos, sin)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(UnsupportedBaseError, match="computes a sequence otherwise beside or after one that reaches"):
        load_one(make_base(tmp_path / "base", "default", "llama"))


def test_errors_of_a_rotary_module_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary module that names a kind and is built otherwise than transformers' own is a reason, not a traceback."""
    folder = make_base(tmp_path / "base", "longrope", "llama")

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> None:
        raise AttributeError("no inv_freq")

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(UnsupportedBaseError, match=r"LlamaForCausalLM cannot be instrumented.*no inv_freq"):
        load_one(folder)


def test_other_kinds_are_left_alone() -> None:
    """A kind that no length changes, or that nobody knows, is neither asked nor changed."""
    module = torch.nn.Module()
    for kind in ("default", "yarn", "a new one", None):
        module.rope_type = kind  # type: ignore[assignment]
        assert fix_rotary(module, 100) == "" and module.rope_type == kind
