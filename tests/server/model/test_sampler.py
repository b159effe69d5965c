"""Sampling: the cuts are those of the field, seeds decide, and neighbours do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from server.core import Row, Sampled, Sampling, ScoredTokens
from server.model.backends.cpu.backend import CpuBackend
from server.model.sampler import draw, penalise, uniform
from server.model.sampler import sample as sample_by


def sample(logits: Tensor, rows: list[Row]) -> list[Sampled]:
    return sample_by(logits, rows, CpuBackend("fp32").best_tokens)


def row(history: list[int] | None = None, num_prompt: int = 1, **fields: Any) -> Row:
    return Row([0], 0, [0], sampling=Sampling(**fields), history=history or [0], num_prompt=num_prompt)


def make_logits(num_rows: int, size: int = 4000, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed))


def allowed(logits: Tensor, fields: dict[str, Any]) -> set[int]:
    """The tokens that transformers' own warpers leave."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if fields.get("top_k"):
        warpers.append(TopKLogitsWarper(fields["top_k"]))
    if fields.get("top_p", 1) < 1:
        warpers.append(TopPLogitsWarper(fields["top_p"]))
    if fields.get("min_p"):
        warpers.append(MinPLogitsWarper(fields["min_p"]))
    return set(torch.isfinite(warpers(None, logits[None])[0]).nonzero()[:, 0].tolist())


CUTS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.7},
    {"top_p": 0.9999},
    {},
]


@pytest.mark.parametrize("fields", CUTS, ids=str)
def test_every_chance_draws_what_transformers_would_allow(fields: dict[str, Any]) -> None:
    """The lowest, the highest and many other chances draw tokens that transformers leaves, and all of a small cut."""
    logits = make_logits(1)[0]
    chances = [0.0, 1 - 1e-12, *torch.rand(400, generator=torch.Generator().manual_seed(1)).tolist()]
    drawn = {draw(logits, Sampling(temperature=1.0, **fields), chance) for chance in chances}
    left = allowed(logits, fields)
    assert drawn <= left
    if len(left) <= 5:
        assert drawn == left


def test_frequencies_are_the_chances() -> None:
    """Evenly spread chances draw each token as often as softmax says."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    counts = Counter(draw(logits, Sampling(temperature=1.0), (i + 0.5) / 2000) for i in range(2000))
    for token, chance in enumerate(logits.softmax(0).tolist()):
        assert abs(counts[token] / 2000 - chance) < 0.002


def test_top_p_beyond_the_quick_candidates_is_exact() -> None:
    """A flat distribution, whose top_p set is larger than the candidates of the quick way, is cut rightly."""
    logits = torch.zeros(5000)
    drawn = {draw(logits, Sampling(temperature=1.0, top_p=0.50009), (i + 0.5) / 9000) for i in range(9000)}
    assert drawn == set(range(2501))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Greedy, seeded, cut and penalised rows give the same token alone and among others."""
    fields: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.2, "seed": 4, "top_p": 0.9},
        {"logprobs": 5},
    ]
    fields += [{"temperature": 1.0, "seed": 5, "top_k": 40, "repetition_penalty": 1.3}]
    rows, logits = [row([0, 7, 9], **f) for f in fields], make_logits(len(fields))
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together == alone


def test_the_seed_and_the_position_decide() -> None:
    """Equal seeds at equal positions draw alike; another seed or another position draws anew."""
    assert uniform(1, 0) == uniform(1, 0)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500


def test_penalties_are_those_of_the_field() -> None:
    """repetition counts prompt and answer, as in transformers; presence and frequency the answer, as at OpenAI."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = make_logits(1, 50)[0]
    history = [3, 4, 4, 5, 5, 5]
    got = penalise(logits, row(history, 2), Sampling(repetition_penalty=1.7))
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), logits[None].clone())[0]
    torch.testing.assert_close(got, wanted)
    got = penalise(logits, row(history, 2), Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0}))
    wanted = logits.clone()
    wanted[4] -= 0.75
    wanted[5] -= 0.5 + 3 * 0.25
    wanted[9] += 2.0
    torch.testing.assert_close(got, wanted)


def test_ties_break_by_token_id() -> None:
    """Among equal logits the lower id is the better one, greedy and in top_k."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    assert sample(logits, [row()])[0].token == 1
    drawn = {draw(logits[0], Sampling(temperature=1.0, top_k=2), (i + 0.5) / 100) for i in range(100)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("size", [1, 255, 256, 1024, 4000, 50257])
def test_the_best_token_is_torchs_argmax(size: int) -> None:
    """Greedy takes the first of the largest logits, whatever the vocabulary's size, and of no rows nothing."""
    logits = make_logits(64, size).round()  # many ties
    got = [each.token for each in sample(logits, [row()] * 64)]
    assert got == [int((each == each.max()).nonzero()[0]) for each in logits]
    assert sample(logits[:0], []) == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    """Logits with a NaN or an infinity are an error of their own row; the others get their tokens."""
    logits = make_logits(3)
    wanted = sample(logits, [row(), row(), row()])
    logits[1, 17] = bad
    got = sample(logits, [row(), row(), row()])
    assert (got[0], got[2]) == (wanted[0], wanted[2])
    assert got[1].error


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Temperature and penalties change the choice, not the log-probabilities that are told."""
    logits = make_logits(1, 100)
    got: Sampled = sample(logits, [row([0, 1, 2], temperature=2.0, repetition_penalty=1.5, logprobs=3, seed=1)])[0]
    scores = logits[0].log_softmax(-1)
    assert got.logprobs is not None
    assert got.logprobs.chosen == pytest.approx(scores[got.token].item())
    assert [token for token, _ in got.logprobs.top] == scores.topk(3).indices.tolist()


def test_a_forced_answer_is_scored() -> None:
    """A given token is taken in its place, with its own log-probability; behind them the model chooses."""
    logits = make_logits(3)
    given: dict[str, Any] = {"forced": (5, 6), "logprobs": 2, "temperature": 0.7}
    rows = [row([0], **given), row([0, 5], **given), row([0, 5, 6], **{**given, "temperature": 0.0})]
    first, second, third = sample(logits, rows)
    assert (first.token, second.token, third.token) == (5, 6, int(logits[2].argmax()))
    for sampled, place, token in ((first, 0, 5), (second, 1, 6)):
        assert sampled.logprobs is not None
        assert sampled.logprobs.chosen == pytest.approx(float(logits[place].log_softmax(-1)[token]))


def test_the_tokens_of_a_prompt_are_scored_beside_others() -> None:
    """Each target has the bits that it has alone, as a forced token or as one of many; a bad row fails alone."""
    logits, tokens = make_logits(44), [at * 7 % 4000 for at in range(40)]
    tokens[3] = int(logits[4].argmax())
    scored = Row([0] * 40, 0, [0], sampling=Sampling(logprobs=2), history=[0], targets=ScoredTokens(0, tokens, 2))
    only = Row([0], 0, [0], history=[0], targets=ScoredTokens(0, [5], 2))
    first, found, last = sample(logits, [row(), scored, only])[:3]
    assert first.token == int(logits[0].argmax()) and found.token == int(logits[41].argmax())
    assert (last.token, len(last.scores), len(found.scores)) == (-1, 1, 40)
    for at, (token, scores) in enumerate(zip(tokens, found.scores, strict=True), start=1):
        (forced,) = sample(logits[at : at + 1], [row(forced=(token,), logprobs=2)])
        assert forced.logprobs == scores and scores.is_greedy == (at == 4)
        assert scores.chosen == pytest.approx(float(logits[at].log_softmax(-1)[token]))
    logits[20, 0] = float("nan")
    again = sample(logits, [row(), scored, only])
    assert (again[0], again[2]) == (first, last) and again[1].error


HOT: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.01},
]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1.0, 1e6])
def test_finite_logits_are_sampled_at_any_temperature(scale: float, temperature: float) -> None:
    """However large the logits and however small the temperature, a token is drawn, and a cold one is the best."""
    logits = make_logits(len(HOT)).clamp(-3, 3) * scale
    rows = [row(temperature=temperature, seed=at, **fields) for at, fields in enumerate(HOT)]
    for index, found in enumerate(sample(logits, rows)):
        assert found.error is None and 0 <= found.token < logits.shape[-1]
        if scale / temperature > 1e9:
            assert logits[index, found.token] == logits[index].max()


def test_penalties_that_overflow_are_an_error_of_the_row() -> None:
    """A row whose logits are not finite after its penalties says so; its neighbour is answered."""
    logits = torch.full((2, 8), 3e38)
    rows = [row(temperature=1.0, repetition_penalty=0.01), row(temperature=1.0)]
    found = sample(logits, rows)
    assert found[0].error == "the logits are not finite after the penalties" and not found[0].is_internal
    assert found[1].error is None


def test_a_row_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises for one row is that row's error; the others get what they get without it."""
    logits = make_logits(3)
    rows = [row(temperature=1.0, seed=at) for at in range(3)]
    alone = sample(logits, rows)

    def raises(logits: Tensor, sampling: Sampling, chance: float) -> int:
        if sampling.seed == 1:
            raise RuntimeError("no token")
        return draw(logits, sampling, chance)

    monkeypatch.setattr("server.model.sampler.draw", raises)
    found = sample(logits, rows)
    assert found[1].is_internal and found[1].error
    assert [found[0], found[2]] == [alone[0], alone[2]]


@pytest.mark.parametrize(
    "fields", [*({"temperature": 1.0, **cut} for cut in CUTS), {}, {"repetition_penalty": 1.5}], ids=str
)
def test_a_mask_leaves_the_vocabulary_that_it_allows(fields: dict[str, Any]) -> None:
    """A row with a mask is sampled as if no other tokens were; its log-probabilities are those without the mask."""
    logits = make_logits(1)
    left = [token for token in range(3, 4000, 3) if token != logits.argmax()]
    mask = bytearray(500)
    for token in left:
        mask[token // 8] |= 1 << token % 8
    for seed in range(20):
        masked = row([0, 7], seed=seed, logprobs=0, **fields)
        masked.mask = bytes(mask)
        alone = torch.full_like(logits, -1e30)
        alone[0, left] = penalise(logits[0], masked, masked.sampling or Sampling())[left]
        unpenalised = {name: value for name, value in fields.items() if name != "repetition_penalty"}
        (found,) = sample(logits, [masked])
        (wanted,) = sample(alone, [row([0, 7], seed=seed, **unpenalised)])
        assert found.token == wanted.token and found.token in left
        assert found.logprobs is not None
        assert found.logprobs.chosen == pytest.approx(float(torch.log_softmax(logits[0], -1)[found.token]))
