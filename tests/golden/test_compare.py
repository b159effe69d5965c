"""The rule by which answers are held against the golden ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.compare import Answer, Verdict, compare, sketch

GOLDEN = Answer([5, 6, 7, 8], [1.0, 0.0005, 1.0, 1.0], [2, 0], [3.5, 1.0])


def test_equal_tokens_have_no_fault() -> None:
    """An answer that equals the golden one is compared at all of its positions."""
    verdict = compare("a", GOLDEN, [5, 6, 7, 8], torch.tensor([1.0, 0.0, 3.5005]))
    assert verdict == Verdict(num_positions=4)


def test_a_close_call_is_excused_and_ends_the_comparison() -> None:
    """A difference where the golden margin is tiny is excused; what follows from it is not compared."""
    verdict = compare("a", GOLDEN, [5, 9, 0, 0])
    assert verdict == Verdict(num_positions=2, num_excused=1, num_skipped=2)


def test_a_clear_difference_is_a_fault() -> None:
    """A difference at a position of clear margin is a fault that names the case, the tokens and the position."""
    assert compare("a", GOLDEN, [4, 6, 7, 8]).faults == ["a: token 4, not 5, at position 0 (margin 1.0)"]


def test_logits_are_held_at_the_golden_ids() -> None:
    """First-token logits are compared by id, not by rank."""
    assert compare("a", GOLDEN, [5, 6, 7, 8], torch.tensor([3.5, 0.0, 1.0])).faults == [
        "a: first-token logits differ by 2.5"
    ]


def test_a_short_answer_is_a_fault() -> None:
    """An answer with a token less than the golden one is a fault."""
    assert compare("a", GOLDEN, [5, 6, 7]).faults == ["a: 3 tokens, not 4"]


def test_excuses_are_limited() -> None:
    """More than 1% of excused positions fail, and so does a comparison of nothing."""
    Verdict(num_positions=100, num_excused=1).check()
    with pytest.raises(AssertionError, match="excuse"):
        Verdict(num_positions=100, num_excused=2).check()
    with pytest.raises(AssertionError, match="nothing"):
        Verdict().check()


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda t: t, True),
        (lambda t: t * (1 + 3e-7 * torch.randn_like(t)), True),  # another CPU's rounding
        (lambda t: t.flip(0), False),
        (lambda t: t * (1 + 1e-3 * torch.randn_like(t)), False),
        (lambda t: t.half(), False),
        (lambda t: t.T.contiguous(), False),
    ],
)
def test_drift_is_told_from_rounding(change: Callable[[Tensor], Tensor], is_same: bool, tmp_path: Path) -> None:
    """A sketch is of the same tensors whatever a CPU's last bits are, and of no others."""
    torch.manual_seed(0)
    tensors, sketches = {"a": torch.randn(40, 30), "b": torch.randn(7, 7)}, []
    for name, made in (("one", tensors), ("other", {**tensors, "a": change(tensors["a"])})):
        (tmp_path / name).mkdir()
        save_file(made, tmp_path / name / "adapter_model.safetensors")
        sketches.append(sketch(tmp_path / name))
    assert sketches[0].is_of(sketches[1]) is is_same
