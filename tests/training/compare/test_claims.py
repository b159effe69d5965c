"""A comparison of figures that were measured: claims, table and plot."""

from __future__ import annotations

from typing import Any

import pytest

from training.compare.claims import Claim, claims
from training.compare.plot import draw
from training.compare.results import Comparison, MethodOutcome, ServerFigures, Serving
from training.compare.scores import NEUTRAL
from training.compare.table import markdown

RAN = {"lora": 0.02, "ia3": 0.9, "full": 0.4}  # made-up: how much more perplexed by a neutral text


def outcome(method: str, **facts: Any) -> MethodOutcome:
    """Return an outcome as it might come out of ten intents."""
    is_full = method == "full"
    scores = {"exact_match": 0.98, "label_accuracy": 0.99, NEUTRAL: 20 * (1 + RAN[method])}
    return MethodOutcome(
        **{
            "method": method,
            "trained_parameters": 134_515_008 if is_full else 814_080,
            "trained_share": 1.0 if is_full else 0.006052,
            "artifact_bytes": 538_000_000 if is_full else 3_300_000,
            "memory_bytes": 2_400_000_000 if is_full else 720_000_000,
            "steps": 100,
            "seconds": 60.0,
            "tokens_per_second": 200.0,
            "before": {"exact_match": 0.0, "label_accuracy": 0.5, NEUTRAL: 20.0},
            "after": scores,
            "serving": None if is_full else Serving(210.0, 0.91, 0.095, 1_650_000),
            "not_served": "it is a new base" if is_full else "",
            **facts,
        }
    )


def comparison(*outcomes: MethodOutcome, **facts: Any) -> Comparison:
    """Return a finished comparison of outcomes."""
    return Comparison(
        {}, "manyhats compare", "2 cores", list(outcomes), **{"server": ServerFigures(8, 64, 3, 230.0), **facts}
    )


def verdicts(*outcomes: MethodOutcome) -> dict[str, str]:
    """Return the claims' verdicts by their first words."""
    return {claim.claim.partition(" (")[0]: claim.verdict for claim in claims(comparison(*outcomes))}


def test_claims_that_hold() -> None:
    """Every claim is told with its figures."""
    found = claims(comparison(outcome("lora"), outcome("full")))
    assert {claim.verdict for claim in found} == {"holds"}
    assert [claim.figures for claim in found] == [
        "0.605% (lora)",
        "3.30 MB (lora); full: 538 MB",
        "0.30 (lora) of its 2,400 MB above the loaded base",
        "perplexity of a neutral text: +2.00% (lora); full: +40.00%",
        "exact match: 98.0% (lora); full: 98.0%",
    ]


def test_claims_that_do_not_hold() -> None:
    """A claim names every method that does not keep it, and says from which to which method the figures go."""
    bad = outcome(
        "ia3",
        trained_share=0.011,
        artifact_bytes=11_000_000,
        memory_bytes=2_400_000_000,
        after={"exact_match": 0.9, "label_accuracy": 0.9, NEUTRAL: 38.0},
    )
    found = claims(comparison(outcome("lora"), bad, outcome("full")))
    assert {claim.verdict for claim in found} == {"not for ia3"}
    assert found[0].figures == "0.605% (lora) to 1.100% (ia3)"
    assert found[4].figures == "exact match: 90.0% (ia3) to 98.0% (lora); full: 98.0%"


def test_claims_about_full_fine_tuning_need_it() -> None:
    """Claims about more and less are not measured without `full`; those about a method alone are."""
    found = verdicts(outcome("lora"))
    assert found.pop("a small share of the parameters") == found.pop("megabytes per task") == "holds"
    assert set(found.values()) == {"not measured: full was not trained"} and len(found) == 3
    assert claims(comparison(outcome("full"))) == []


def test_a_base_that_takes_no_memory_of_note() -> None:
    """Full fine-tuning that added no page of memory is not compared with: the claim is not measured."""
    found = verdicts(outcome("lora", memory_bytes=0), outcome("full", memory_bytes=0))
    assert found["less memory to train than full fine-tuning"] == "not measured"


def test_free_answers_are_held_by_bleu() -> None:
    """BLEU says how good answers are if they are no labels."""
    scores = {"exact_match": 0.1, "label_accuracy": None, "bleu": 54.8, NEUTRAL: 21.0}
    free = [outcome(name, after=scores, before={**scores, "bleu": 3.1, NEUTRAL: 20.0}) for name in ("lora", "full")]
    assert claims(comparison(*free))[-1] == Claim(
        "as good as full fine-tuning in the same budget (within 1 point)", "BLEU: 54.8 (lora); full: 54.8", "holds"
    )
    table = markdown(comparison(*free))
    assert "|  | BLEU | exact match |" in table and "| the base | 3.1 | 10.0% | +0.00% | 100% |" in table


def test_the_table() -> None:
    """The table has a row a method, the base's if a column has its figure, and a line for each failure."""
    table = markdown(comparison(outcome("lora"), outcome("full"), failed={"ia3": "too little memory"}))
    for line in (
        "| `lora` | 814,080 (0.605%) | 3.30 MB | 720 MB | 100, 60 | 200 |",
        "| `full` | 134,515,008 (100.000%) | 538 MB | 2,400 MB | 100, 60 | 200 |",
        "| the base | 0.0% | 50.0% | +0.00% | 100% | - | - |",
        "| `lora` | 98.0% | 99.0% | +2.00% | 91% | 95 ms | 1.65 MB |",
        "| `full` | 98.0% | 99.0% | +40.00% | - | - | - |",
        "* `ia3` failed: too little memory",
        "* `full` is not served: it is a new base",
    ):
        assert f"{line}\n" in table
    assert "8 requests at once" in table and "230 tokens/s" in table


def test_the_plot_has_a_panel_for_each_trade_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, memory, speed, quality, forgetting and serving; what was not measured is a dash."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **more: Any) -> None:
        drawn.append(self)
        real(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    assert draw(comparison(outcome("lora"), outcome("full"))).startswith(b"\x89PNG")
    panels = {axes.get_title().partition("\n")[0]: [text.get_text() for text in axes.texts] for axes in drawn[0].axes}
    assert panels == {
        "trained parameters": ["814,080", "134,515,008"],
        "peak memory above the base, MB": ["720", "2,400"],
        "training tokens/s": ["200", "200"],
        "exact match after the same budget": ["98.0%", "98.0%"],
        "forgetting: perplexity of a neutral text": ["+2%", "+40%"],
        "decode speed when served, of the base's": ["91%", "-"],
    }
