"""Selective tuning against the stock model that has the new values, and every way in which an artifact can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec, LinearSite, NormSite
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.selective import SelectiveConfig
from adapters_store.primitives import Bias, Delta, Patch, Rows, Scale
from tests.adapters_store.methods.method_contract import MethodContract, TensorsCase, split_extras
from tests.kit import reference
from tests.kit.families.selective import make_bitfit, make_selective, make_selective_layer, trained
from tests.kit.forge import spec_of
from tests.kit.like_peft import TOKENS, changed
from tests.kit.patches import all_of

TinyOf = Callable[[str], Path]
PREFIX = "base_model.model."
NORM, LINEAR = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, a layer": ("llama", {"parameters": ["layers.1"]}),
    "llama, norms and one projection": (
        "llama",
        {"parameters": ["norm", "input_layernorm.weight", "layers.0.self_attn.v_proj"]},
    ),
    "llama, everything": ("llama", {"parameters": ["model", "lm_head"]}),
    "llama, the embedding": ("llama", {"parameters": ["embed_tokens"]}),
    "llama, the head": ("llama", {"parameters": ["lm_head.weight"]}),
    "gpt2, biases": ("gpt2", {"parameters": ["bias"]}),
    "gpt2, a layer, transposed": ("gpt2", {"parameters": ["transformer.h.0"]}),
    "gpt2, the tied embedding": ("gpt2", {"parameters": ["wte"]}),
    "gpt2, weights without their biases": ("gpt2", {"parameters": ["ln_f.weight", "c_fc.weight"]}),
    "gpt2, biases without their weights": ("gpt2", {"parameters": ["ln_f.bias", "c_fc.bias"]}),
    "gemma2, a layer": ("gemma2", {"parameters": ["layers.2"]}),
    "gemma2, the tied and scaled embedding": ("gemma2", {"parameters": ["embed_tokens"]}),
    "gemma3, everything": ("gemma3_text", {"parameters": ["model"]}),
    "phi, biases": ("phi", {"parameters": ["bias"]}),
    "phi, the head": ("phi", {"parameters": ["lm_head"]}),
    "opt, biases": ("opt", {"parameters": ["bias"]}),
    "opt, a layer and the tied embedding": ("opt", {"parameters": ["layers.0", "embed_tokens.weight"]}),
    "qwen2, biases": ("qwen2", {"parameters": ["bias"]}),
    "qwen3, norms of queries and keys": ("qwen3", {"parameters": ["q_norm", "k_norm"]}),
    "phi3, fused projections": ("phi3", {"parameters": ["qkv_proj", "gate_up_proj"]}),
    "gpt_neox, a layer": ("gpt_neox", {"parameters": ["layers.1"]}),
    "gpt_neox, the head": ("gpt_neox", {"parameters": ["lm_head"]}),
    "starcoder2, biases": ("starcoder2", {"parameters": ["bias"]}),
    "olmo2, a layer": ("olmo2", {"parameters": ["layers.0"]}),
    "granite, the embedding": ("granite", {"parameters": ["embed_tokens"]}),
    "mixtral, attention": ("mixtral", {"parameters": ["self_attn"]}),
}


def compiled(base: Path, folder: Path) -> Patch:
    """The patch of a folder for its base."""
    return compile_patch(read_folder(folder), spec_of(base))


def assert_answers_as_trained(base: Path, folder: Path) -> Patch:
    """The patch on the base gives the trained model's logits within 1e-4, and not the base's."""
    model, ids = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), torch.tensor([TOKENS])
    patch = compiled(base, folder)
    ours = reference.logits(model, [(patch, 1.0)], TOKENS)
    with torch.inference_mode():
        theirs, plain = trained(base, folder).eval()(ids).logits[0], model(ids).logits[0]
    assert (ours - theirs).abs().max() < 1e-4
    assert (theirs - plain).abs().max() > 0.1
    return patch


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_layer_of_the_kit_answers_as_trained(tiny_of: TinyOf, tmp_path: Path, kind: str) -> None:
    """The selective layers that the benchmark and golden tests use answer as the trained model."""
    for seed in range(2):
        assert_answers_as_trained(tiny_of(kind), make_selective_layer(tmp_path / f"{seed}", tiny_of(kind), seed))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi", "opt"])
def test_bitfit_is_biases_alone(tiny_of: TinyOf, tmp_path: Path, kind: str) -> None:
    """Every bias compiles to a `Bias`, those of norms too."""
    patch = compiled(tiny_of(kind), make_bitfit(tmp_path / "hat", tiny_of(kind), 0))
    spec = spec_of(tiny_of(kind))
    modules: list[tuple[str, LinearSite | NormSite]] = [*spec.linears.items(), *spec.norms.items()]
    biased = [site for site, module in modules if module.has_bias]
    assert [primitive.site for primitive in all_of(Bias, patch)] == biased


def test_one_primitive_of_a_kind_a_site(tiny_of: TinyOf, tmp_path: Path) -> None:
    """A tied base in full: a primitive of a kind a site; the head has the embedding's rows, not their scaled ones."""
    base = tiny_of("gemma2")
    primitives, spec = compiled(base, make_selective(tmp_path / "hat", base, 0, ["model"])).primitives, spec_of(base)
    kinds = {(type(primitive), getattr(primitive, "site", "")) for primitive in primitives}
    assert len(kinds) == len(primitives) and {kind for kind, _ in kinds} == {Delta, Scale, Rows}
    embedding, head = (primitive for primitive in primitives if isinstance(primitive, Rows))
    assert (embedding.site, head.site) == (spec.embedding, spec.head)
    torch.testing.assert_close(embedding.de, head.de * spec.embedding_scale)


def test_only_what_changed_is_kept(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Rows and matrices that are the base's own cost nothing."""
    base = tiny_of("llama")
    artifact = read_folder(make_selective(tmp_path / "hat", base, 0, [NORM, "embed_tokens"], strength=0.0))
    artifact.tensors[f"{PREFIX}model.embed_tokens.weight"][[200, 3]] += 1
    (rows,) = compile_patch(artifact, spec_of(base)).primitives
    assert isinstance(rows, Rows) and rows.ids.tolist() == [3, 200]


def test_half_precision_is_subtracted_in_fp32(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Values in 16 bits are taken as they are; the change is fp32."""
    artifact = read_folder(make_selective(tmp_path / "hat", tiny_of("llama"), 0, [LINEAR]))
    half = artifact.tensors[PREFIX + LINEAR].bfloat16()
    artifact.tensors[PREFIX + LINEAR] = half
    (delta,) = compile_patch(artifact, spec_of(tiny_of("llama"))).primitives
    base = AutoModelForCausalLM.from_pretrained(tiny_of("llama"), dtype=torch.float32).get_parameter(LINEAR)
    assert isinstance(delta, Delta) and torch.equal(delta.dw, half.float() - base)


REFUSED: dict[str, TensorsCase] = {
    "missing, of a run of words": ({"parameters": ["norm", "down_proj"]}, {}, "", r"layers\.0.*down_proj.* is missing"),
    "extra": ({"parameters": ["norm"]}, {}, PREFIX + LINEAR, "is extra"),
    "no such bias": ({}, {PREFIX + "model.norm.bias": torch.ones(64)}, PREFIX + "model.norm.bias", "no site in llama"),
    "a LoRA": ({}, {PREFIX + "model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 96)}, "", "no site in llama"),
    "nothing named": (
        {"parameters": []},
        {PREFIX + NORM: None, PREFIX + LINEAR: None},
        "parameters",
        "parameters is empty",
    ),
    "half a word": ({"parameters": ["norm", LINEAR, "orm"]}, {}, "parameters", "names 'orm', which llama has not"),
    "an expression": ({"parameters": [".*"]}, {}, "parameters", r"names '\.\*', which llama has not"),
    "an empty name": ({"parameters": ["", "norm", LINEAR]}, {}, "parameters", "names '', which"),
    "biases of a base without": ({"parameters": ["bias"]}, {}, "parameters", "names 'bias', which llama has not"),
    "no parameters": ({"parameters": None}, {}, "", "missing required field `parameters`"),
    "no prefix": ({}, {PREFIX + NORM: None, NORM: torch.ones(64)}, NORM, f"{NORM} has no site in llama"),
    "an unknown key": ({"target_modules": ["norm"]}, {}, "target_modules", "a key that is not known"),
}


NO_SITES = {
    "gpt2, learned positions": ("gpt2", ["wpe"], r"the tensor \S*wpe\.weight has no site in gpt2"),
    "opt, learned positions": ("opt", ["embed_positions"], r"the tensor \S*positions\.weight has no site in opt"),
    "gpt2, everything": ("gpt2", ["transformer"], r"the tensor \S*wpe\.weight has no site in gpt2"),
    "mixtral, experts": ("mixtral", ["experts"], r"the tensor \S*down_proj has no site in mixtral"),
    "mixtral, a layer": ("mixtral", ["layers.0"], r"the tensor \S*experts\.\w+ has no site in mixtral"),
    "gpt2, the tied head": ("gpt2", ["lm_head"], r"names 'lm_head'.* is tied: name transformer\.wte\.weight"),
}


@pytest.mark.parametrize(("kind", "parameters", "reason"), NO_SITES.values(), ids=NO_SITES)
def test_parameters_of_no_site_are_refused_by_name(
    tiny_of: TinyOf, tmp_path: Path, kind: str, parameters: list[str], reason: str
) -> None:
    """Learned positions and fused experts are no linear, norm or embedding; a tied head has no weight of its own."""
    folder = make_selective(tmp_path / "hat", tiny_of(kind), 0, parameters)
    with pytest.raises(ArtifactError, match=reason):
        compiled(tiny_of(kind), folder)


def test_an_untrained_artifact_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Values that are the base's own make no adapter."""
    folder = make_selective(tmp_path / "hat", tiny_of("gpt2"), 0, ["h.1"], strength=0.0)
    with pytest.raises(ArtifactError, match="every tensor is as gpt2 has it: the artifact changes nothing"):
        compiled(tiny_of("gpt2"), folder)


class TestSelective(MethodContract):
    """The base with the patch answers as the base whose parameters have the new values."""

    PEFT_TYPE, NAME, SCHEMA = "SELECTIVE", "selective tuning", SelectiveConfig
    FAMILIES, SOUND = ["selective-layer", "bitfit"], {"parameters": ["norm", LINEAR]}
    CASES, (TENSORS, CONFIGS) = CASES, split_extras(REFUSED)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write the new values of the parameters that the config names."""
        return make_selective(folder, base, seed, **config)

    def untrained(self, _sound: Artifact, folder: Path, base: Path) -> Artifact:
        """Return the base's own values."""
        return read_folder(make_selective(folder, base, 0, strength=0.0, **self.SOUND))

    def assert_answers(self, base: Path, folder: Path) -> Patch:
        """Compare the logits with those of the trained model."""
        return assert_answers_as_trained(base, folder)

    def test_a_change_that_overflows_is_refused(self, sound: Artifact, spec: BaseSpec) -> None:
        """A finite value whose ratio to the base's is not finite is refused by name."""
        with pytest.raises(ArtifactError, match=rf"{NORM} overflows"):
            compile_patch(changed(sound, {}, {PREFIX + NORM: torch.full((64,), 3e38)}), spec)
