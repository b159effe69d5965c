"""Tokenizers of every kind that bases have, trained in milliseconds on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.kit.tiny import make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CALL = "<tool_call>"  # an added token that is not special: answers show it
RUN = "    "  # an added token that is white space, as bases for code have them
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{# a call is <tool_call> #}"
)
LINES = [
    "the card arrival was late, and the customer asked: where is my new card?",
    "tokens are not text, text is not tokens; 12 + 34 = 46",
    "user system assistant <|im|> start end s /s tool call",
    "héllo wörld, naïve café",
] * 4


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: bytes, merged."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: a space is put before a text and stripped again, and bytes are a fallback."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", *fallback]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, max_token_length=8, show_progress=False)
    made.train_from_iterator(LINES, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    state = json.loads(made.to_str())
    state["added_tokens"] = []  # the trainer made the bytes special, which are pieces as any other
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT's: words in small letters, white space is dropped."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))  # noqa: S106
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return made


def unigram() -> tokenizers.Tokenizer:
    """As XLNet's: pieces by their likelihood, forms of a character made one, unknown ones fused."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=["<unk>", "</s>"],
            unk_token="<unk>",  # noqa: S106
            show_progress=False,
        ),
    )
    return made


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
    "unigram": unigram,
}


def save_tokenizer(kind: str, folder: Path) -> Path:
    """Write a tokenizer of a kind, or the `bytes` of the tiny base, with special tokens and a chat template."""
    if kind == "bytes":
        make_tokenizer().save_pretrained(folder)
        return folder
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in (CALL, RUN)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return folder
