"""The base's tokenizer as llguidance needs it: which bytes each token of the vocabulary stands for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import llguidance.hf
from llguidance import LLTokenizer
from transformers import AutoTokenizer

log = logging.getLogger(__name__)


def load_form_tokenizer(folder: Path, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer | None:
    """Build it; None, and a word in the log, if the base's tokenizer is of no use for it.

    A base may have more tokens than its tokenizer, or fewer.
    """
    try:
        if not eos_token_ids:
            raise ValueError("the base names no token that ends an answer")
        if (found := _tokenizer_file(folder)) is not None:
            text, num_tokens = found
            return LLTokenizer(text, n_vocab=max(vocab_size, num_tokens), eos_token=eos_token_ids)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return llguidance.hf.from_tokenizer(tokenizer, max(vocab_size, len(tokenizer)), eos_token_ids)
    except Exception as error:  # noqa: BLE001 - whatever a base's files hold: it is served without forms
        log.warning("answers of this base cannot be held to a form (response_format): %s", error)
        return None


def _tokenizer_file(folder: Path) -> tuple[str, int] | None:
    """Read `tokenizer.json` and count its tokens; None if there is none, or if transformers would add tokens to it.

    transformers takes a second to make it, which is a tenth of a start.
    """
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.exists() or (folder / "added_tokens.json").exists():
        return None
    text = file.read_text(encoding="utf-8")
    tokenizer, told = json.loads(text), json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    vocabulary, added = tokenizer["model"]["vocab"], {token["id"] for token in tokenizer["added_tokens"]}
    if not added.issuperset(map(int, told.get("added_tokens_decoder", ()))):
        return None
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return text, 1 + max(*ids, *added)
