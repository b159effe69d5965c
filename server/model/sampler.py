"""Choose and score tokens: each row by its own settings and its own seed, whatever else is in the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from server.core import Logprobs, Row, Sampled, Sampling, ScoredTokens

log = logging.getLogger(__name__)

NUM_CANDIDATES = 1024  # a sort of the whole vocabulary costs ten times a top-k of this size
SCORED_ROWS = 16  # whose distributions are held at once


def sample(logits: Tensor, rows: list[Row], best_tokens: Callable[[Tensor], Tensor]) -> list[Sampled]:
    """Choose one token per row that is sampled, and score its targets, from logits [R, vocabulary] in fp32.

    Each row has `Row.num_logits` of the logits. What is not finite, or raises, is an error of its row alone: no other
    row is computed again for it. `best_tokens` is the backend's, see `Backend.best_tokens`.
    """
    best_of_rows, sampled, end = best_tokens(logits).tolist(), [], 0
    for row in rows:
        first, end = end, end + row.num_logits
        sampled.append(_guarded(logits[first:end], row, best_of_rows[first:end]))
    return sampled


def _guarded(logits: Tensor, row: Row, best: list[int]) -> Sampled:
    if min(best) < 0:
        return Sampled(error="the logits are not finite")
    try:
        sampled = Sampled() if row.sampling is None else _sample_row(logits[-1], row, row.sampling, best[-1])
        sampled.scores = [] if row.targets is None else _scores(logits, row.targets, best)
        return sampled
    except OverflowError as error:
        return Sampled(error=str(error))
    except Exception:
        log.exception("a row raised in the sampler", extra={"sampling": str(row.sampling)})
        return Sampled(error="the sampler failed on this request; the server's log says why", is_internal=True)


def _sample_row(logits: Tensor, row: Row, sampling: Sampling, best: int) -> Sampled:
    place = len(row.history) - row.num_prompt
    given = sampling.forced[place : place + 1]
    token = given[0] if given else _choose(logits, row, sampling, best, place)
    if sampling.logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprobs(logits[None], [token], sampling.logprobs, [best])[0])


def _scores(logits: Tensor, targets: ScoredTokens, best: list[int]) -> list[Logprobs]:
    """Score the targets [n] of a row by the first n of its logits, a few at a time."""
    scores: list[Logprobs] = []
    for first in range(0, len(targets.tokens), SCORED_ROWS):
        some = slice(first, min(first + SCORED_ROWS, len(targets.tokens)))
        scores += _logprobs(logits[some], targets.tokens[some], targets.num_top, best[some])
    return scores


def _choose(logits: Tensor, row: Row, sampling: Sampling, best: int, place: int) -> int:
    changed = penalise(logits, row, sampling)
    if row.mask is not None:
        return _choose_allowed(changed, row.mask, sampling, best if changed is logits else None, place)
    if sampling.temperature == 0:
        return best if changed is logits else int(changed.argmax())
    return draw(_divide(changed, sampling.temperature), sampling, uniform(sampling.seed, place))


def _choose_allowed(logits: Tensor, mask: bytes, sampling: Sampling, best: int | None, place: int) -> int:
    """Choose among the tokens of a mask as if the vocabulary had no others; `best` is the best of all, if it is known.

    The best of all is the best of those that may be, if it may be: then no mask is unpacked.
    """
    if sampling.temperature == 0 and best is not None and mask[best // 8] >> best % 8 & 1:
        return best
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=logits.shape[-1], bitorder="little")
    allowed = torch.from_numpy(np.flatnonzero(bits.view(bool))).to(logits.device)  # as bool: eight times as fast
    logits = logits[allowed]
    if sampling.temperature == 0:
        return int(allowed[logits.argmax()])
    return int(allowed[draw(_divide(logits, sampling.temperature), sampling, uniform(sampling.seed, place))])


def _divide(logits: Tensor, temperature: float) -> Tensor:
    """Return logits [vocabulary] by the temperature, less a constant if they would be too large for fp32."""
    scaled, best = logits / temperature, logits.max()
    if torch.isfinite(best / temperature):
        return scaled
    if not torch.isfinite(best):
        raise OverflowError("the logits are not finite after the penalties")
    return (logits.double() - best.double()) / temperature


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position of the token in the answer alone (Philox)."""
    return float(np.random.Generator(np.random.Philox(key=[seed % 2**64, position])).random())


def penalise(logits: Tensor, row: Row, sampling: Sampling) -> Tensor:
    """Apply logit_bias and the penalties to logits [vocabulary]; the same tensor if there are none.

    repetition divides (or multiplies, if negative) the logits of all tokens seen (CTRL, arXiv:1909.05858); presence
    and frequency subtract for tokens of the answer alone, as OpenAI's API defines them.
    """
    output = row.history[row.num_prompt :]
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if penalties == (1.0, 0.0, 0.0) and not sampling.logit_bias:
        return logits
    logits = logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.history)), device=logits.device)
        scores = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    if output:
        tokens, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[tokens] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    return logits


def draw(logits: Tensor, sampling: Sampling, chance: float) -> int:
    """Invert the distribution function of softmax(logits [vocabulary]), cut by top_k, top_p and min_p, at `chance`.

    The cuts are made in this order, each on what the one before left, as vLLM and transformers make them; equal logits
    are ordered by token id, so that ties break the same way everywhere.
    """
    values, tokens, total = _candidates(logits, sampling)
    chances = torch.exp(values.double() - total)
    last = len(chances) - 1
    if sampling.min_p > 0 or sampling.top_p < 1:
        # top_p keeps the smallest set of best tokens that reaches p; min_p those of at least p times the best's chance.
        keep = chances >= sampling.min_p * chances.max()
        if sampling.top_p < 1:
            keep &= chances.cumsum(-1) - chances < sampling.top_p
        chances, last = torch.where(keep, chances, 0.0), int(keep.nonzero()[-1])
    reached = chances.cumsum(-1)
    index = int(torch.searchsorted(reached, chance * reached[-1], right=True))
    return int(tokens[min(index, last)])


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, tokens, and the logsumexp of what they are a part of.

    The top_k, best first; or as many of the best as top_p and min_p can reach; or all, in order of the vocabulary
    if nothing is cut by rank.
    """
    num_tokens = logits.shape[-1]
    if 0 < sampling.top_k < num_tokens:
        values, tokens = _sorted_top(logits, sampling.top_k)
        return values, tokens, torch.logsumexp(values.double(), -1)
    total = torch.logsumexp(logits.double(), -1)
    if sampling.top_p == 1:
        return logits, torch.arange(num_tokens, device=logits.device), total
    values, tokens = _sorted_top(logits, min(NUM_CANDIDATES, num_tokens))
    if torch.exp(values.double() - total).sum() < sampling.top_p:
        values, tokens = logits.sort(descending=True, stable=True)
    return values, tokens, total


def _sorted_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best, best first, ties by token id."""
    least = logits.topk(count).values[-1]
    tokens = (logits >= least).nonzero()[:, 0]
    values, order = logits[tokens].sort(descending=True, stable=True)
    return values[:count], tokens[order[:count]]


def _logprobs(logits: Tensor, tokens: Sequence[int], num_top: int, best: list[int]) -> list[Logprobs]:
    """Return the log-probabilities of tokens [n] by logits [n, vocabulary], whose best tokens are `best`."""
    scores = torch.log_softmax(logits, -1)
    chosen = scores[torch.arange(len(tokens)), list(tokens)].tolist()
    values, alternatives = scores.topk(num_top)
    tops = zip(alternatives.tolist(), values.tolist(), strict=True)
    return [
        Logprobs(chosen[index], list(zip(*top, strict=True)), tokens[index] == best[index])
        for index, top in enumerate(tops)
    ]
