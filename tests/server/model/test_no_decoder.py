"""A base that is no decoder with attention is refused by a sentence, in the server, in training and by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adapters_store.base.describe import describe
from adapters_store.base.identity import BaseUnavailableError
from adapters_store.base.resolve import resolve_base
from server.model.errors import UnsupportedBaseError
from server.model.load import load_base

SMALL = {"vocab_size": 99, "hidden_size": 32}
MADE: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, num_hidden_layers=2)),
    "bert": lambda: BertLMHeadModel(
        BertConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_no_decoder_is_a_sentence(tmp_path: Path, name: str) -> None:
    """Recurrent bases, encoders and those without numbered positions are named as what they are not."""
    model = MADE[name]()
    with pytest.raises(BaseUnavailableError, match=f"{type(model).__name__} is no decoder of layers with"):
        describe(model, name, "a" * 64, tmp_path)
    model.save_pretrained(tmp_path / name)
    with pytest.raises(UnsupportedBaseError, match=f"{type(model).__name__} is no decoder of layers with"):
        load_base(tmp_path / name, name, "fp32", "cpu")


def test_an_encoder_with_a_decoder_is_refused_by_its_config(tmp_path: Path) -> None:
    """One with an encoder is refused before anything of it is loaded, and in a line if it is loaded all the same."""
    t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    with pytest.raises(BaseUnavailableError, match=r"is an encoder with a decoder \(t5\)"):
        resolve_base(str(tmp_path))
    with pytest.raises(UnsupportedBaseError, match="cannot be loaded as a decoder-only base") as caught:
        load_base(tmp_path, "t5", "fp32", "cpu")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", ""])
def test_quantised_weights_are_refused_by_the_method(tiny_base: Path, tmp_path: Path, method: str) -> None:
    """A folder of quantised weights is refused with its method and what to serve instead."""
    copy = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(BaseUnavailableError, match=rf"quantised weights \({method or 'quantization_config'}\)"):
        resolve_base(str(copy))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_config_that_is_none_is_a_sentence(tmp_path: Path, text: str) -> None:
    """A config.json that is no JSON object is named."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseUnavailableError, match=r"config\.json (cannot be read|is no JSON object)"):
        resolve_base(str(tmp_path))
