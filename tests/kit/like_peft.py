"""What a compiled patch answers against what PEFT's own model answers for the same folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared import config
from adapters_store.methods.shared.unused_tensors import unused_tensors, with_grad_tracking
from adapters_store.primitives import Patch
from tests.kit import reference
from tests.kit.forge import spec_of

TOKENS = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_answers_as_peft(base: Path, folder: Path, **inputs: Tensor) -> Patch:
    """The patch gives PEFT's logits within 1e-4 on 20 tokens, and logits other than the base's by more than 0.1.

    No tensor is idle: the door would refuse it. `inputs` are what PEFT's model must be told beside the tokens.
    """
    followed = with_grad_tracking(read_folder(folder))
    with torch.enable_grad():
        assert unused_tensors(followed, compile_patch(followed, spec_of(base))) == []
    patch = compile_patch(read_folder(folder), spec_of(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours, plain = reference.logits(model, [(patch, 1.0)], TOKENS), reference.logits(model, [], TOKENS)
    theirs = peft_logits(base, folder, **inputs)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 0.1
    return patch


@torch.inference_mode()
def peft_logits(base: Path, folder: Path, **inputs: Tensor) -> Tensor:
    """Logits [20, vocabulary] of PEFT's model, without those of virtual tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    logits: Tensor = model.eval()(torch.tensor([TOKENS]), **inputs).logits[0, -len(TOKENS) :].float()
    return logits


def changed(artifact: Artifact, config: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> Artifact:
    """The same artifact with other values of the config and other tensors; None takes a tensor away."""
    new = {name: tensor for name, tensor in {**artifact.tensors, **tensors}.items() if tensor is not None}
    return dataclasses.replace(artifact, config={**artifact.config, **config}, tensors=new)


def assert_every_key_is_judged(peft_config: type, schema: type[Struct], *judged: Collection[str]) -> None:
    """No key of PEFT's config class is unknown to us: a new PEFT that adds one turns this red."""
    written = {field.name for field in dataclasses.fields(peft_config)}
    known = {*config.IGNORED_KEYS, *config.SERVED_VALUES, *schema.__struct_fields__}
    assert written <= known.union(*judged)
