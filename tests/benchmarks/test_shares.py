"""What is made of the batches' times."""

from __future__ import annotations

import pytest

from tests.benchmarks.results import Timing
from tests.benchmarks.shares import BASE, Decode, Families, NeverTogetherError, Wait, decode_rate, spread


def streamed(first: float, gaps: list[float], sizes: list[int]) -> Timing:
    return Timing(4, sum(sizes), 0.0, first + sum(gaps), first, gaps, sizes)


def test_the_rate_is_of_the_time_in_which_all_decode() -> None:
    """Neither the wait before the last request's first token counts, nor what is left after the first one's end."""
    early = streamed(1.0, [4.0, 0.5, 0.5], [1, 1, 1, 1])  # while it waits 4 s, the late one's prompt is computed
    late = streamed(5.0, [0.5, 0.5, 0.1, 0.1], [1, 1, 1, 1, 1])  # when it is alone it is fast
    assert decode_rate([early, late]) == pytest.approx(4.0)


def test_a_piece_of_several_tokens_counts_as_several() -> None:
    """Tokens whose text was held back count when they come."""
    assert decode_rate([streamed(0.0, [1.0, 1.0], [1, 3, 1])]) == pytest.approx(2.0)


def test_a_step_counts_whole_however_its_pieces_come() -> None:
    """The pieces of a step come one after the other; that makes the rate neither more nor less."""
    batch = [streamed(0.001 * place, [0.1] * 8, [1] * 9) for place in range(16)]
    assert decode_rate(batch) == pytest.approx(160.0)


def test_a_batch_that_was_never_together_has_no_rate() -> None:
    """A request that ended before another began is an error, not a figure."""
    with pytest.raises(NeverTogetherError, match="before another"):
        decode_rate([streamed(0.0, [1.0], [1, 1]), streamed(2.0, [1.0], [1, 1])])


def test_a_method_is_held_against_the_base_around_it() -> None:
    """The share is against the mean of the base before and after, batch by batch."""
    rates = [(BASE, 100.0), ("lora", 90.0), ("ia3", 120.0), (BASE, 140.0), ("lora", 110.0), (BASE, 80.0)]
    assert Families(decodes=[Decode(*one) for one in rates]).shares() == {"lora": [0.75, 1.0], "ia3": [1.0]}


def test_a_batch_without_the_base_after_it_has_no_share_yet() -> None:
    """While the bench runs, batches that the base does not follow are left out."""
    rates = [(BASE, 100.0), ("lora", 90.0), (BASE, 100.0), ("ia3", 50.0)]
    assert list(Families(decodes=[Decode(*one) for one in rates]).shares()) == ["lora"]


def test_the_ratio_of_waits_is_of_their_medians() -> None:
    """One slow answer changes nothing."""
    assert Wait("prompt-tuning", 100, 32, [10.0, 20.0, 900.0], [22.0, 21.0, 800.0]).ratio == pytest.approx(1.1)


@pytest.mark.parametrize(("num", "chosen"), [(3, "ace"), (6, "abcdef"), (8, "abcdefab"), (4, "abde")])
def test_a_mixed_batch_wears_as_many_methods_as_it_can(num: int, chosen: str) -> None:
    """At even distances where there are more methods than requests, over and over where there are fewer."""
    assert "".join(spread(list("abcdef"), num)) == chosen
