"""Soft prompts: virtual tokens before the prompt, given by their input embeddings, initialised from a text by default.

Prompt tuning (arXiv:2104.08691), p-tuning (arXiv:2103.10385), multitask prompt tuning (arXiv:2303.02861) and
context-aware prompt tuning (arXiv:2410.17222), all through PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.trainable import ADAPTER_NAME, PeftAdapter, attach_peft
from training.options import CptOptions, MultitaskOptions, PromptOptions, PTuningOptions

TASK_TYPE = "CAUSAL_LM"
RANDOM = "random"  # value of --init-text: begin at random numbers
EMBEDDINGS = "prompt_embeddings"
MAX_LABELS = 20  # answers that a text can name


class PromptAdapter(PeftAdapter):
    """An adapter of virtual tokens; the encoder's output at the end of training is stored."""

    @torch.no_grad()
    def finalize(self, dtype: torch.dtype) -> None:
        """Put the rounded embeddings in the encoder's place."""
        embeds = self.model.get_prompt_embedding_to_save(ADAPTER_NAME).to(dtype).float()
        encoder, device = self.model.prompt_encoder[ADAPTER_NAME], self.model.device
        encoder.embedding = nn.Embedding.from_pretrained(embeds.to(device), freeze=True)
        self.peft_config.inference_mode = True  # PEFT reads the embedding itself now

    def tensors(self) -> dict[str, Tensor]:
        """Return the embeddings [virtual tokens, hidden]."""
        if self.peft_config.inference_mode:
            return {EMBEDDINGS: self.model.prompt_encoder[ADAPTER_NAME].embedding.weight}
        return {EMBEDDINGS: self.model.get_prompt_embedding_to_save(ADAPTER_NAME)}


def default_text(base: Base, rows: Sequence[TokenizedRow]) -> str:
    """Return an instruction, which names the answers if they are few."""
    answers = dict.fromkeys(base.tokenizer.decode(row.completion[:-1]).strip() for row in rows)
    if 1 < len(answers) <= MAX_LABELS:
        return f"Classify the text. Answer with one of: {', '.join(answers)}."
    return "Answer the following as in the examples that you have seen before."


def text_ids(text: str, num_tokens: int, base: Base) -> list[int]:
    """Return a text's token ids, repeated and cut to a number. Raises `OptionError` for a text without tokens."""
    ids: list[int] = base.tokenizer(text)["input_ids"]
    if not ids:
        raise OptionError("--init-text has no tokens.")
    return (ids * -(-num_tokens // len(ids)))[:num_tokens]


def check_num_tokens(number: int, base: Base) -> None:
    """Raise `OptionError` unless positions are left for a prompt."""
    if not 0 < number < base.spec.max_positions:
        raise OptionError(f"--num-virtual-tokens must be between 1 and {base.spec.max_positions - 1}, not {number}.")


def _text_embeds(options: PromptOptions, base: Base, rows: Sequence[TokenizedRow]) -> Tensor | None:
    """Return the embeddings to begin with, or None for PEFT's random ones."""
    if options.init_text == RANDOM:
        return None
    text = options.init_text or default_text(base, rows)
    embedding = base.model.get_input_embeddings()
    ids = torch.tensor(text_ids(text, options.num_virtual_tokens, base), device=embedding.weight.device)
    with torch.no_grad():
        embeds: Tensor = embedding(ids).float().clone()
    return embeds


def _begin_with(model: Any, embeds: Tensor | None) -> None:
    if embeds is not None:
        model.prompt_encoder[ADAPTER_NAME].embedding.weight.data.copy_(embeds)


def prompt_tuning(options: PromptOptions, base: Base, rows: Sequence[TokenizedRow]) -> PromptAdapter:
    """Attach prompt tuning through PEFT. Raises `OptionError`."""
    from peft import PromptTuningConfig

    check_num_tokens(options.num_virtual_tokens, base)
    embeds = _text_embeds(options, base, rows)
    model = attach_peft(base, PromptTuningConfig(num_virtual_tokens=options.num_virtual_tokens, task_type=TASK_TYPE))
    _begin_with(model, embeds)
    return PromptAdapter(model)


def p_tuning(options: PTuningOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PromptAdapter:
    """Attach p-tuning through PEFT. Raises `OptionError`."""
    from peft import PromptEncoderConfig

    check_num_tokens(options.num_virtual_tokens, base)
    kind = options.encoder_reparameterization_type.upper()
    if kind not in ("MLP", "LSTM"):
        raise OptionError(f"--encoder-reparameterization-type must be MLP or LSTM, not {kind}.")
    config = PromptEncoderConfig(
        num_virtual_tokens=options.num_virtual_tokens,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=options.encoder_hidden_size,
        task_type=TASK_TYPE,
    )
    return PromptAdapter(attach_peft(base, config))


class MultitaskAdapter(PeftAdapter):
    """A prompt E * (C R), whose factors are trained and stored; C R begins as ones, and so the prompt as the text."""

    def __init__(self, model: Any, num_ranks: int) -> None:
        super().__init__(model)
        encoder = model.prompt_encoder[ADAPTER_NAME]
        encoder.prefix_task_cols.data.fill_(1.0 / num_ranks)
        encoder.prefix_task_rows.data.fill_(1.0)
        if num_ranks > 1:  # equal ranks would stay equal
            encoder.prefix_task_rows.data.add_(torch.randn_like(encoder.prefix_task_rows), alpha=0.02)
        model.forward = partial(model.forward, task_ids=torch.tensor([0], device=model.device))


def multitask(options: MultitaskOptions, base: Base, rows: Sequence[TokenizedRow]) -> MultitaskAdapter:
    """Attach multitask prompt tuning of one task, through PEFT. Raises `OptionError`."""
    from peft import MultitaskPromptTuningConfig

    check_num_tokens(options.num_virtual_tokens, base)
    if options.num_ranks < 1:
        raise OptionError(f"--num-ranks must be at least 1, not {options.num_ranks}.")
    embeds = _text_embeds(options, base, rows)
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=options.num_virtual_tokens, num_ranks=options.num_ranks, num_tasks=1, task_type=TASK_TYPE
    )
    model = attach_peft(base, config)
    _begin_with(model, embeds)
    return MultitaskAdapter(model, options.num_ranks)


def cpt(options: CptOptions, base: Base, rows: Sequence[TokenizedRow]) -> PromptAdapter:
    """Attach the context's embeddings, each moved by at most `epsilon`, through PEFT. Raises `OptionError`."""
    from peft import CPTConfig

    check_num_tokens(options.num_virtual_tokens, base)
    ids, kinds = _context(options, base, rows)
    config = CPTConfig(
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=kinds,
        opt_projection_epsilon=options.epsilon,
        opt_projection_format_epsilon=options.epsilon,
        task_type=TASK_TYPE,
    )
    return PromptAdapter(attach_peft(base, config))


def _context(options: CptOptions, base: Base, rows: Sequence[TokenizedRow]) -> tuple[list[int], list[int]]:
    """Return the context's token ids, and PEFT's type of each: 2 of an input, 4 of an answer, which stays as it is."""
    if options.init_text:
        ids = text_ids(options.init_text, options.num_virtual_tokens, base)
        return ids, [2] * len(ids)
    ids, kinds = list[int](), list[int]()
    end: list[int] = base.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row in sorted(rows, key=lambda row: row.line):
        answer = [*row.completion[:-1], *end]
        if ids and len(ids) + row.num_prompt + len(answer) > options.num_virtual_tokens:
            break
        ids += [*row.ids[: row.num_prompt], *answer]
        kinds += [2] * row.num_prompt + [4] * len(answer)
    return ids[: options.num_virtual_tokens], kinds[: options.num_virtual_tokens]
