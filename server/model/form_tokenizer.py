"""The base's tokenizer as llguidance needs it: which bytes each token of the vocabulary stands for."""

from __future__ import annotations

import logging
from pathlib import Path

import llguidance.hf
from llguidance import LLTokenizer
from transformers import AutoTokenizer

log = logging.getLogger(__name__)


def load_form_tokenizer(folder: Path, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer | None:
    """Build it, which takes a second for 49k tokens; None, and a word in the log, if the base's is of no use for it."""
    try:
        if not eos_token_ids:
            raise ValueError("the base names no token that ends an answer")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        num_tokens = max(vocab_size, len(tokenizer))  # a base may have more than its tokenizer, or fewer
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=eos_token_ids)
    except Exception as error:  # noqa: BLE001 - whatever a base's files hold: it is served without forms
        log.warning("answers of this base cannot be held to a form (response_format): %s", error)
        return None
