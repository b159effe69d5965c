"""Free greedy answers to many prompts at once, with a cache of keys and values.

Prompts are padded on the right. Padding is masked and positions are given, so that a row's answer is the one it gives
alone. A base whose attention slides counts its window in cached positions: there a batch has prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.data.batch import cut_before_head

Prompt = tuple[int, ...]
BATCH = 16


def answer_texts(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    ends: frozenset[int],
    max_tokens: int,
    on_rows: Callable[[int], None],
) -> list[str]:
    """Return the text of each prompt's greedy answer, which ends at a token of `ends`."""
    if not prompts:
        return []
    answers = answer(model, prompts, ends, max_tokens, on_rows)
    return [tokenizer.decode(answers[prompt]).strip() for prompt in prompts]


@torch.inference_mode()
def answer(
    model: Any,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    max_tokens: int,
    on_rows: Callable[[int], None] = lambda _num: None,
) -> dict[Prompt, list[int]]:
    """Return each prompt's greedy answer as token ids before the first of `ends`, at most `max_tokens` of them."""
    model.eval()
    answers: dict[Prompt, list[int]] = {}
    for batch in _batches(prompts, is_sliding=_is_sliding(model.config)):
        for prompt, tokens in zip(batch, _decode(model, batch, ends, max_tokens), strict=True):
            answers[prompt] = list(takewhile(lambda token: token not in ends, tokens))
        on_rows(len(batch))
    return answers


def _is_sliding(config: Any) -> bool:
    text = config.get_text_config()
    return "sliding_attention" in (getattr(text, "layer_types", None) or ()) or bool(
        getattr(text, "sliding_window", None)
    )


def _batches(prompts: Sequence[Prompt], is_sliding: bool) -> Iterator[list[Prompt]]:
    ordered = sorted(prompts, key=len)
    for _length, group in groupby(ordered, key=lambda prompt: len(prompt) if is_sliding else 0):
        of_group = list(group)
        yield from (of_group[i : i + BATCH] for i in range(0, len(of_group), BATCH))


def _decode(model: Any, prompts: Sequence[Prompt], ends: frozenset[int], max_tokens: int) -> list[list[int]]:
    device = next(model.parameters()).device
    last = torch.tensor(sorted(ends), device=device)
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    places = torch.arange(ids.shape[1], device=device)
    is_prompt = (places < lengths).long()
    with cut_before_head(model, places == lengths - 1):
        output = model(input_ids=ids, attention_mask=is_prompt, use_cache=True)
    cache, logits = output.past_key_values, output.logits[: len(prompts)]
    num_virtual = cache.get_seq_length() - ids.shape[1]
    attention = torch.cat([is_prompt.new_ones(len(prompts), num_virtual), is_prompt], dim=1)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # virtual tokens are in the cache
    chosen: list[Tensor] = []
    for place in range(max_tokens):
        chosen.append(logits.argmax(-1))
        if place == max_tokens - 1 or bool(torch.isin(torch.stack(chosen), last).any(0).all()):
            break
        attention = torch.cat([attention, attention.new_ones(len(prompts), 1)], dim=1)
        logits = inner(
            input_ids=chosen[-1][:, None],
            attention_mask=attention,
            position_ids=num_virtual + lengths + place,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    tokens: list[list[int]] = torch.stack(chosen, dim=1).tolist()
    return tokens
