"""Likeness of texts to references: ROUGE-L and BLEU. A text may have several references."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L [0, 1] (https://aclanthology.org/W04-1013), the mean over texts; the best reference counts.

    F1 of the longest common subsequence of words, in lower case and without stemming. Unlike the package rouge-score,
    a word may be of any script.
    """
    scores = [max(_f1(text, other) for other in several) for text, several in zip(texts, references, strict=True)]
    return sum(scores) / len(texts)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's corpus BLEU [0, 100], with its defaults."""
    from sacrebleu import corpus_bleu

    max_references = max(map(len, references))
    streams = [[several[i] if i < len(several) else None for several in references] for i in range(max_references)]
    return float(corpus_bleu(list(texts), streams).score)


def _f1(text: str, reference: str) -> float:
    ours, theirs = WORD.findall(text.lower()), WORD.findall(reference.lower())
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for i, other in enumerate(theirs):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return row[-1]
