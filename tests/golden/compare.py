"""The golden file's form, and the rule by which an answer is held against it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor

MARGIN = 1e-3  # where the reference's two best tokens are closer, either is right
LOGITS_TOLERANCE = 1e-3
MAX_EXCUSED = 0.01  # share of all positions
NUM_LOGITS = 32
SKETCH_TOLERANCE = 1e-5  # of the norm


class Answer(msgspec.Struct):
    """One greedy answer of the oracle: per position the gap of the two best logits; the first token's best logits."""

    tokens: list[int]
    margins: list[float]
    first_ids: list[int]
    first_logits: list[float]


def begin(answer: Answer, num_tokens: int | None) -> Answer:
    """The answer to the same request with fewer tokens; None leaves it whole."""
    return replace(answer, tokens=answer.tokens[:num_tokens], margins=answer.margins[:num_tokens])


class Sketch(msgspec.Struct):
    """Tensors but for their last bits: those of an encoder's or a decomposition's output differ from CPU to CPU."""

    names: str  # sha256 of names, types and shapes
    norm: float
    weighted: float  # a sum in which every number has a weight of its own

    def is_of(self, other: Sketch) -> bool:
        """Whether the tensors are the same but for rounding."""
        gap = max(abs(self.norm - other.norm), abs(self.weighted - other.weighted))
        return self.names == other.names and gap <= SKETCH_TOLERANCE * self.norm


def sketch(folder: Path) -> Sketch:
    """Of all tensors in a folder's safetensors files."""
    names, squares, weighted = hashlib.sha256(), 0.0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            names.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            numbers = tensor.flatten().double()
            squares += float(numbers @ numbers)
            weighted += float(numbers @ torch.cos(torch.arange(len(numbers), dtype=torch.float64)))
    return Sketch(names.hexdigest(), squares**0.5, weighted)


class Adapter(msgspec.Struct):
    """How `make_lora` makes it, and a sketch of its tensors, which notices drift."""

    config: dict[str, Any]
    sketch: Sketch


class Golden(msgspec.Struct):
    """One base (its tensors' digest notices drift), prompts as token ids, and `answers[adapter or "base"][prompt]`."""

    made_with: dict[str, str]
    base_sha256: str
    strength: float
    prompts: list[list[int]]
    adapters: dict[str, Adapter]
    answers: dict[str, list[Answer]]


def read(path: Path) -> dict[str, Golden]:
    """The golden answers by name of the base."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Golden])


class Verdict(msgspec.Struct):
    """What a comparison found; verdicts add up."""

    num_positions: int = 0
    num_excused: int = 0
    num_skipped: int = 0
    faults: list[str] = []

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.num_positions + other.num_positions,
            self.num_excused + other.num_excused,
            self.num_skipped + other.num_skipped,
            self.faults + other.faults,
        )

    def check(self) -> None:
        """Raise an AssertionError that names the first differences, or the excuses if they are too many."""
        assert not self.faults, f"{len(self.faults)} differences from the golden answers:\n" + "\n".join(
            self.faults[:10]
        )
        assert self.num_positions > 0, "nothing was compared"
        share = self.num_excused / self.num_positions
        assert share <= MAX_EXCUSED, f"{share:.1%} of {self.num_positions} positions needed the excuse of a close call"


def compare(name: str, golden: Answer, tokens: list[int], first_logits: Tensor | None = None) -> Verdict:
    """Hold `tokens` against the golden answer, token-exact.

    A difference where the golden margin is under `MARGIN` is excused, and ends the comparison of this answer.
    `first_logits` [vocabulary] are held to `LOGITS_TOLERANCE` at the golden top ids.
    """
    verdict = Verdict(faults=_compare_logits(name, golden, first_logits))
    if len(tokens) != len(golden.tokens):
        verdict.faults.append(f"{name}: {len(tokens)} tokens, not {len(golden.tokens)}")
    for position, (want, got, margin) in enumerate(zip(golden.tokens, tokens, golden.margins, strict=False)):
        verdict.num_positions += 1
        if want == got:
            continue
        if margin < MARGIN:
            verdict.num_excused += 1
        else:
            verdict.faults.append(f"{name}: token {got}, not {want}, at position {position} (margin {margin})")
        verdict.num_skipped = len(golden.tokens) - position - 1
        break
    return verdict


def _compare_logits(name: str, golden: Answer, logits: Tensor | None) -> list[str]:
    if logits is None:
        return []
    gap = (logits[golden.first_ids] - torch.tensor(golden.first_logits)).abs().max().item()
    return [] if gap <= LOGITS_TOLERANCE else [f"{name}: first-token logits differ by {gap:.2g}"]
