"""Parity as a trainer writes it, from the slow twin of the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from adapters_store.format.folder import read_folder
from adapters_store.format.manifest import ParityCase
from adapters_store.methods.compile import compile_patch
from tests.kit import reference
from tests.kit.forge import spec_of

NUM_TOP, NUM_TOKENS = 20, 6


def parity_of(base: Path, folder: Path, prompts: Sequence[list[int]]) -> list[ParityCase]:
    """What an artifact answers to prompts: the best logits after each, and its greedy continuation."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    worn = [(compile_patch(read_folder(folder), spec_of(base)), 1.0)]
    cases = []
    for prompt in prompts:
        best = reference.logits(model, worn, prompt)[-1].topk(NUM_TOP)
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        cases.append(ParityCase(prompt, top, reference.greedy(model, worn, prompt, NUM_TOKENS)))
    return cases
