"""LoRA against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared.targets import PatternTable, Targets, named_sites
from adapters_store.primitives import LowRank
from tests.adapters_store.methods.lora_contract import LoraContract
from tests.adapters_store.methods.method_contract import ConfigCase, TensorsCase, on
from tests.kit.adapters import make_lora
from tests.kit.forge import SITE, a_name, spec_of, toy_artifact, toy_config, toy_spec, toy_tensors
from tests.kit.patches import all_of
from tests.kit.tiny import make_tiny_base

CASES: dict[str, dict[str, Any]] = {
    "all linear": {},
    "attention only, r 1": {"r": 1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rsLoRA": {"r": 16, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"k_proj": 1, "mlp.up_proj": 9},
    },
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 33}, "alpha_pattern": {"q_proj": 7}},
    "anchored pattern": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers by pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "excluded by expression": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"},
    "excluded by a text": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": "model.layers.0.self_attn.k_proj",
    },
    "a text": {"target_modules": "model.layers...mlp.up_proj"},
    "expression": {"target_modules": r".*\.(0|1)\..*(q|down)_proj"},
    "the head too": {"target_modules": ["lm_head", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


def peft_deltas(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each weight, [out, in], by site."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def assert_equals_peft(base: Path, folder: Path, is_transposed: bool = False) -> None:
    """The patch adds what PEFT adds, at the same sites."""
    deltas = peft_deltas(base, folder)
    primitives = all_of(LowRank, compile_patch(read_folder(folder), spec_of(base)))
    assert {primitive.site for primitive in primitives} == deltas.keys()
    for primitive in primitives:
        ours = primitive.b @ primitive.a
        torch.testing.assert_close(ours.T if is_transposed else ours, deltas[primitive.site], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lora_adds_what_peft_adds(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """B A with the folded scale is PEFT's delta weight at exactly PEFT's sites, whatever the config."""
    assert_equals_peft(tiny_base, make_lora(tmp_path / "hat", tiny_base, seed=5, **case))


def test_lora_on_conv1d_adds_what_peft_adds(tmp_path: Path) -> None:
    """gpt2's Conv1D keeps its weight transposed; A and B act as on any linear layer."""
    base = make_tiny_base(tmp_path / "gpt2", "gpt2")
    folder = make_lora(tmp_path / "hat", base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert_equals_peft(base, folder, is_transposed=True)


@pytest.mark.parametrize("shorthand", ["all-linear", "All-Linear"])
def test_all_linear_leaves_the_head_out(shorthand: str) -> None:
    """all-linear means every linear layer but the head, whether the config says it in capitals or not."""
    compile_patch(toy_artifact(toy_config(target_modules=shorthand)), toy_spec())
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(2, 8),
        "base_model.model.lm_head.lora_B.weight": torch.ones(16, 2),
    }
    with pytest.raises(ArtifactError, match=r"lm_head\.lora_A\.weight is extra"):
        compile_patch(toy_artifact(toy_config(target_modules=shorthand), {**toy_tensors(), **head}), toy_spec())
    compile_patch(
        toy_artifact(toy_config(target_modules=["q_proj", "k_proj", "lm_head"]), {**toy_tensors(), **head}), toy_spec()
    )


@pytest.mark.parametrize("init", ["PiSSA", "pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_a_lora_relative_to_a_changed_base_is_refused(init: str) -> None:
    """Initialisations that move the base's weights are refused, with how to save a plain LoRA from them."""
    with pytest.raises(ArtifactError, match="path_initial_model_for_weight_conversion") as caught:
        compile_patch(toy_artifact(toy_config(init_lora_weights=init)), toy_spec())
    assert (caught.value.code, caught.value.param) == ("method_unsupported", "init_lora_weights")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_other_initialisations_say_nothing_about_the_answer(init: object) -> None:
    """An initialisation that leaves the base's weights unchanged does not change the answer."""
    compile_patch(toy_artifact(toy_config(init_lora_weights=init)), toy_spec())


CONFIGS: dict[str, ConfigCase] = {
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is negative": ({"r": -1}, "r has the rank -1"),
    "r is huge": ({"r": 10**19}, "r has the rank"),
    "r is absent": ({"r": None}, "missing required field `r`"),
    "alpha is 0": ({"lora_alpha": 0}, "lora_alpha has the alpha 0"),
    "alpha is huge": ({"lora_alpha": 1e300}, "lora_alpha has the alpha 1e\\+300"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": 1e9}}, "alpha_pattern has the alpha"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has the rank 0"),
    "expression as a pattern": ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has a key .*\(a\+\)\+\$"),
    "expression as alpha's": ({"alpha_pattern": {"q|k": 2}}, r"alpha_pattern has a key .*q\|k"),
    "3,000 patterns": ({"rank_pattern": {f"m{i}": 2 for i in range(3000)}}, "rank_pattern has 3000 keys"),
    "unknown init": ({"init_lora_weights": "magic"}, "init_lora_weights=magic is not known"),
    "bias of another kind": ({"bias": "some"}, r"Invalid enum value 'some'.*\$\.bias"),
    "lora_bias and use_dora": ({"lora_bias": True, "use_dora": True}, "PEFT has no lora_bias with use_dora"),
    "layers are texts": ({"layers_to_transform": ["0"]}, r"\$\.layers_to_transform"),
}


NO_PREFIX, B_BIAS = a_name().removeprefix("base_model."), a_name(matrix="B").replace("weight", "bias")
MAGNITUDE = a_name().replace("lora_A.weight", "lora_magnitude_vector")
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
TENSORS: dict[str, TensorsCase] = {
    "a site is missing": ({}, {a_name(): None, a_name(matrix="B"): None}, a_name(), "is missing: target_modules names"),
    "another rank": ({"r": 4}, {}, a_name(), r"shape \[2, 8\].*need \[4, 8\]"),
    "another rank by a pattern": ({"rank_pattern": {"k_proj": 3}}, {}, a_name(0, "k_proj"), r"need \[3, 8\]"),
    "a tensor of the base": ({}, {"model.norm.weight": torch.ones(8)}, "model.norm.weight", "no site in toy"),
    "no prefix": ({}, {NO_PREFIX: torch.ones(2, 8)}, NO_PREFIX, "no site in toy"),
    "DoRA's magnitude": ({}, {MAGNITUDE: torch.ones(8)}, MAGNITUDE, "no site"),
    "B's bias": ({}, {B_BIAS: torch.ones(8)}, B_BIAS, "no site in toy"),
    "no such embedding": ({}, {EMBEDDING: torch.ones(2, 16)}, EMBEDDING, "no site in toy"),
    "a site of no target": ({"target_modules": ["q_proj"]}, {}, a_name(0, "k_proj"), "is extra"),
    "a text that is no whole name": ({"target_modules": "q_proj"}, {}, a_name(0, "k_proj"), "is extra"),
    "a text that is one": ({"target_modules": SITE.format(0, "k_proj")}, {}, a_name(), "is extra"),
    "excluded by a text": ({"exclude_modules": SITE.format(0, "k_proj")}, {}, a_name(0, "k_proj"), "is extra"),
    "an excluded site": ({"exclude_modules": ["k_proj"]}, {}, a_name(0, "k_proj"), "is extra"),
}


PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "10", "mlp", "q_proj", "q", "sub_layers"])
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)


@settings(max_examples=300, deadline=None)
@given(NAMES, st.lists(st.tuples(st.booleans(), NAMES, st.booleans()), max_size=4))
def test_patterns_match_as_in_peft(site: str, keys: list[tuple[bool, str, bool]]) -> None:
    """The first pattern that matches a site is the one that PEFT's expression matches, without running one."""
    texts = [("^" if anchor else "") + (key.replace("_", ".") if is_loose else key) for anchor, key, is_loose in keys]
    patterns = {text: place for place, text in enumerate(texts)}
    expected = patterns.get(get_pattern_key(list(patterns), site), -1)
    assert PatternTable(patterns, -1)[site] == expected


def ends_of(sites: list[str]) -> st.SearchStrategy[str]:
    """Names that are a site, or all of one behind a dot."""
    parts = [site.split(".") for site in sites]
    return st.sampled_from([".".join(names[start:]) for names in parts for start in range(len(names))])


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.lists(NAMES, min_size=1, max_size=4),
    st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 10]), max_size=2),
    st.none() | PARTS | NAMES | st.lists(PARTS | NAMES, max_size=2),
)
def test_targets_are_selected_as_in_peft(
    data: st.DataObject, sites: list[str], layers: int | list[int] | None, patterns: str | list[str] | None
) -> None:
    """The sites that lists of names select are those that PEFT selects."""
    names = ends_of(sites) | NAMES
    targets = data.draw(st.lists(names, min_size=1, max_size=3))
    excluded = data.draw(st.none() | st.lists(names, max_size=1))
    spec = BaseSpec("toy", "a" * 64, "Toy", 99, 8, 2, 64, {site: LinearSite(8, 8) for site in sites})
    keys: dict[str, Any] = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    expected = {
        site for site in sites if check_target_module_exists(SimpleNamespace(**keys, layers_pattern=patterns), site)
    }
    assert named_sites(Targets(layers_pattern=patterns, **keys), sites, spec) == expected


def test_a_pattern_for_layers_is_never_run() -> None:
    """An expression in layers_pattern is never run: the tensors alone decide which sites are changed."""
    config = toy_config(layers_to_transform=[0], layers_pattern=["(a+)+$"])
    sites = {primitive.site for primitive in all_of(LowRank, compile_patch(toy_artifact(config), toy_spec()))}
    assert SITE.format(1, "q_proj") in sites


class TestLora(LoraContract):
    """The toy's LoRA against its spec; those of the kit against PEFT."""

    UNTRAINED = "lora_B"
    FAMILIES, FAMILY_ON = ["lora", "lora-bias", "lora-saved"], [("llama", 0), ("phi3", 2)]
    CASES = on("gpt2", {"on Conv1D": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}})
    TENSORS, CONFIGS = TENSORS, CONFIGS

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls) -> Artifact:
        """A LoRA of the toy's projections."""
        return toy_artifact()

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> BaseSpec:
        """The spec of the toy base."""
        return toy_spec()

    def test_half_precision_is_folded_in_fp32(self) -> None:
        """Tensors in 16 bits become fp32 before the scale is folded in."""
        halves = {name: tensor.bfloat16() for name, tensor in toy_tensors().items()}
        (first, *_) = all_of(LowRank, compile_patch(toy_artifact(toy_config(lora_alpha=3), halves), toy_spec()))
        assert first.a.dtype == first.b.dtype == torch.float32
        assert torch.equal(first.b, halves[f"base_model.model.{first.site}.lora_B.weight"].float() * 1.5)

    def test_all_that_peft_writes_by_default_is_taken(self) -> None:
        """PEFT's defaults, all written out, are no reason to refuse; its fields are what it writes."""
        written = {field.name for field in dataclasses.fields(PeftLoraConfig)} - {"runtime_config"}
        assert {**PeftLoraConfig(task_type="CAUSAL_LM").to_dict(), "r": 2}.keys() == written
        compile_patch(toy_artifact({**PeftLoraConfig(task_type="CAUSAL_LM").to_dict(), **toy_config()}), toy_spec())

    def test_a_scale_that_overflows_is_refused(self) -> None:
        """Finite tensors whose scaled product is not are refused by name."""
        tensors = toy_tensors() | {a_name(matrix="B"): torch.full((8, 2), 1e38)}
        with pytest.raises(ArtifactError, match=r"q_proj\.lora_B\.weight overflows where it is compiled"):
            compile_patch(toy_artifact(toy_config(lora_alpha=10_000), tensors), toy_spec())
