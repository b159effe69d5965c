"""The engine, in one mixed batch, against Hugging Face and PEFT alone (`make_golden.py`)."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest

from tests.golden import cases, drive
from tests.golden.compare import Golden, begin, compare, read, sketch
from tests.kit.adapters import tensors_digest
from tests.kit.tiny import make_tiny_base

DRIFT = "{} is not what the golden answers were made with; run `python -m tests.golden.make_golden`"


SHORT = 12  # tokens of an answer that is not compared as a whole


def check(golden: Golden, base: Path, scratch: Path, whole_every: int = 1, **limits: Any) -> None:
    """Every prompt with every adapter and none, together in one continuous batch, equals its golden answer.

    Answers to every so many-th prompt are compared as a whole, the others in their first `SHORT` tokens.
    """
    assert tensors_digest(base) == golden.base_sha256, DRIFT.format("the base")
    configs = {name: adapter.config for name, adapter in golden.adapters.items()}
    folders = cases.make_adapters(scratch, base, configs, golden.strength)
    for name, folder in folders.items():
        assert golden.adapters[name].sketch.is_of(sketch(folder)), DRIFT.format(name)
    keys = [(name, index) for name, answers in golden.answers.items() for index in range(len(answers))]
    wanted = [begin(golden.answers[name][index], SHORT if index % whole_every else None) for name, index in keys]
    requests = [
        drive.Request(name, golden.prompts[index], len(want.tokens))
        for (name, index), want in zip(keys, wanted, strict=True)
    ]
    answers = drive.run(drive.load_runner(base), folders, requests, **limits)
    assert [got.failure for got in answers] == [None] * len(answers)
    verdicts = [
        compare(f"{name}, prompt {index}", want, got.tokens, got.first_logits)
        for (name, index), want, got in zip(keys, wanted, answers, strict=True)
    ]
    reduce(add, verdicts).check()


@pytest.mark.parametrize("model_type", cases.TINY_TYPES)
def test_tiny(model_type: str, tmp_path: Path) -> None:
    """Each architecture, instrumented, answers as Hugging Face and PEFT do, base and LoRA in one batch."""
    base = make_tiny_base(tmp_path / "base", model_type)
    check(read(cases.HERE / "golden_tiny.json")[model_type], base, tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_families(model_type: str, tmp_path: Path) -> None:
    """Three artifacts of every method or more, and the base, in one batch, answer as PEFT or the reference does."""
    base = make_tiny_base(tmp_path / "base", model_type)
    check(read(cases.HERE / "golden_families.json")[model_type], base, tmp_path)


@pytest.mark.real_base
@pytest.mark.timeout(1800)
def test_families_on_the_real_base(real_base: Path, tmp_path: Path) -> None:
    """The same with SmolLM2."""
    golden = read(cases.HERE / "golden_families.json")["smollm2-135m"]
    check(golden, real_base, tmp_path, whole_every=2, slot_bytes=2 * 2**30, host_bytes=2 * 2**30)


@pytest.mark.real_base
@pytest.mark.timeout(1800)
def test_real(real_base: Path, tmp_path: Path) -> None:
    """SmolLM2 with 12 LoRA of all ranks, placements and scalings and with none answers as Hugging Face and PEFT do."""
    check(read(cases.HERE / "golden_real.json")["smollm2-135m"], real_base, tmp_path, whole_every=5)
