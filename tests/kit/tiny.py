"""Tiny random bases with a byte-level tokenizer: real Hugging Face folders that load in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN = 64
SLIDING_WINDOW = 24  # smaller than the longer prompts of the tests
MAX_POSITIONS = 1024
NUM_BYTES = 256
BOS, EOS, PAD = 256, 257, 258  # token ids; below them a token's id is its byte
VOCAB_SIZE = 259
GEMMA_NORM = 1.5  # its norms multiply by 1 + weight; less, and the (scaled, tied) embedding repeats the last token
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 96, "attention_dropout": 0.0}
_MIXED_LAYERS = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": SLIDING_WINDOW,
}
_GEMMA = {**_GQA, **_MIXED_LAYERS, "head_dim": 32, "query_pre_attn_scalar": 32}

# What each type is here for: the thing that only it (of these) does.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "qwen2": _GQA,  # bias on q, k, v alone
    "qwen3": {**_GQA, "head_dim": 32},  # norms on q and k; heads wider than hidden / heads
    "mistral": {**_GQA, "sliding_window": SLIDING_WINDOW},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA,  # two rotary bases
    "phi": {**_GQA, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {**_GQA, "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # fused q, k, v and gate, up
    "gpt_neox": {
        **_COMMON,
        "intermediate_size": 96,
        "rotary_pct": 0.25,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "gpt2": {  # Conv1D, learned positions
        **{key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": MAX_POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "olmo2": _GQA,  # norms after the sublayers
    "starcoder2": {
        **_GQA,
        "sliding_window": SLIDING_WINDOW,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_bias": True,
    },
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "attention_dropout": 0.0},
    "granite": {
        **_GQA,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def make_tiny_base(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random base of `model_type` (a key of `CONFIGS`) to `folder`, the same for the same seed.

    `changes` are keys of its config that differ from those of `CONFIGS`.

    2-3 layers, hidden 64, the byte tokenizer of `make_tokenizer`. Its greedy answers are spread: the weights are larger
    than a trained model's, so that the two best tokens are seldom close.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes}), dtype=torch.float32
    )
    randomise(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter from the seed: matrices keep the scale of what they are fed, vectors move a little."""
    generator = torch.Generator().manual_seed(seed)
    is_gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.1 + (GEMMA_NORM if is_gemma else 0.0))
            else:
                parameter.copy_(noise * _gain(name, parameter, is_gemma))


def _gain(name: str, parameter: Tensor, is_gemma: bool) -> float:
    if "embed" in name or "wte" in name or "wpe" in name:
        return 0.1 if is_gemma else 0.4
    root: float = float(parameter.shape[-1]) ** 0.5
    return 3.0 / root


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte (id = byte), and `<bos>`, `<eos>`, `<pad>`: any text and any bytes have ids."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<bos>", "<eos>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",  # noqa: S106 - a token, not a password
        eos_token="<eos>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte, as GPT-2's byte-level tokenizers write it."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(NUM_BYTES)]
