"""LoHa against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig as PeftLoHaConfig

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.loha import LohaConfig
from adapters_store.methods.shared.lycoris import IGNORED_KEYS, SERVED_VALUES
from adapters_store.primitives import Delta, LowRank
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import make_loha, spread_loha
from tests.kit.forge import spec_of
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

SITE = "base_model.model.model.layers.{}.self_attn.{}.hada_{}"
A1, B1 = SITE.format(0, "k_proj", "w1_a"), SITE.format(0, "k_proj", "w1_b")  # [32, 3], [3, 64]
A2, B2 = SITE.format(0, "k_proj", "w2_a"), SITE.format(0, "k_proj", "w2_b")
Q = SITE.format(0, "q_proj", "w1_a")
TARGETS: dict[str, Any] = {"r": 3, "alpha": 2, "target_modules": ["q_proj", "k_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "all linear": {"r": 4, "alpha": 3, "target_modules": "all-linear"},
    "whole updates": {"r": 9, "alpha": 9, "target_modules": "all-linear"},
    "rank 1": {"r": 1, "alpha": 1, "target_modules": "all-linear"},
    "patterns": {**TARGETS, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.k_proj": 5}},
    "anchored pattern": {**TARGETS, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "one layer": {**TARGETS, "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {**TARGETS, "alpha": -8, "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "what training alone needs": {**TARGETS, "rank_dropout": 0.5, "module_dropout": 0.5, "use_effective_conv2d": True},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)"},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of queries and keys."""
    config = PeftLoHaConfig(task_type="CAUSAL_LM", **TARGETS)
    return read_folder(make_peft(tmp_path_factory.mktemp("loha") / "hat", tiny_base, config, fill=spread_loha))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loha_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """The product of elements, as two factors or whole, gives PEFT's logits."""
    config = PeftLoHaConfig(task_type="CAUSAL_LM", **case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=spread_loha))


@pytest.mark.parametrize("model_type", ["phi3", "opt", "gemma2"])
def test_loha_answers_as_in_peft_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str
) -> None:
    """Fused projections and biases take the same products."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_loha(tmp_path / "hat", base, seed=3))


def test_whatever_holds_fewer_numbers_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    """Two factors of rank r^2 where they are the smaller, the whole update where they are not."""
    for rank, kind in ((5, LowRank), (6, Delta)):  # 64 x 64: equal at rank 32
        config = PeftLoHaConfig(task_type="CAUSAL_LM", **{**TARGETS, "r": rank, "target_modules": ["q_proj"]})
        folder = make_peft(tmp_path / str(rank), tiny_base, config, fill=spread_loha)
        patch = assert_answers_as_peft(tiny_base, folder)
        assert {type(primitive) for primitive in patch.primitives} == {kind}
        assert patch.num_items == 2 * (25 * 128 if kind is LowRank else 64 * 64)


def test_a_conv1d_has_no_loha(sound: Artifact, tiny_of: Callable[[str], Path]) -> None:
    """PEFT does not have it there; what its tensors would mean is not guessed."""
    name = "base_model.model.transformer.h.0.attn.c_attn.hada_w1_a"
    tensors = {name.replace("w1_a", end): torch.ones(2, 2) for end in ("w1_a", "w1_b", "w2_a", "w2_b")}
    foreign = changed(sound, {}, {**dict.fromkeys(sound.tensors), **tensors})
    with pytest.raises(ArtifactError, match=r"c_attn\.hada_w1_a acts on a Conv1D") as caught:
        compile_patch(foreign, spec_of(tiny_of("gpt2")))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", name)


CORE = SITE.format(0, "k_proj", "t1")
TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "w1_a is missing": ({}, {A1: None}, A1, "is missing"),
    "w1_b is missing": ({}, {B1: None}, B1, "is missing"),
    "w2_a is missing": ({}, {A2: None}, A2, "is missing"),
    "w2_b is missing": ({}, {B2: None}, B2, "is missing"),
    "a site is missing": ({}, dict.fromkeys([A1, B1, A2, B2]), A1, "is missing: target_modules names its site"),
    "w1_a is transposed": ({}, {A1: torch.ones(3, 32)}, A1, r"shape \[3, 32\].*need \[32, 3\]"),
    "w2_b is transposed": ({}, {B2: torch.ones(64, 3)}, B2, r"need \[3, 64\]"),
    "another base's width": ({}, {B1: torch.ones(3, 65)}, B1, r"shape \[3, 65\].*need \[3, 64\]"),
    "one dimension": ({}, {A2: torch.ones(96)}, A2, r"shape \[96\]"),
    "another rank": ({"r": 4}, {}, Q, r"shape \[64, 3\].*need \[64, 4\]"),
    "another rank by a pattern": ({"rank_pattern": {"k_proj": 2}}, {}, A1, r"need \[32, 2\]"),
    "no such layer": ({}, {A1.replace(".0.", ".7."): torch.ones(32, 3)}, A1.replace(".0.", ".7."), "no site in"),
    "a core": ({}, {CORE: torch.ones(3, 3, 1, 1)}, CORE, "LoHa of a convolution .* is not served"),
    "another method's": ({}, {A1.replace("hada", "lokr"): torch.ones(2, 2)}, A1.replace("hada", "lokr"), "no site in"),
    "a site of no target": ({"target_modules": ["q_proj"]}, {}, A1, "is extra"),
    "a layer of no target": ({"layers_to_transform": [1]}, {}, A1, "is extra"),
    "overflow": ({}, {A1: torch.full((32, 3), 3e38), A2: torch.full((32, 3), 9.0)}, A1, "overflows where it is"),
    "overflow of b": ({}, {B1: torch.full((3, 64), 3e38), B2: torch.full((3, 64), 9.0)}, B1, "overflows where it is"),
}


@pytest.mark.parametrize(("config", "tensors", "name", "reason"), TENSORS.values(), ids=TENSORS)
def test_config_tensors_and_base_must_agree(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], tensors: dict[str, Any], name: str, reason: str
) -> None:
    """A tensor without its site, a site without its tensor, a wrong shape or rank: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(sound, config, tensors), spec)
    assert (caught.value.param, name in str(caught.value)) == (name, True)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "LoHa with modules_to_save=.* is not served"),
    "task_type": ({"task_type": "SEQ_CLS"}, "LoHa with task_type=SEQ_CLS is not served"),
    "an unknown key": ({"use_rslora": True}, "a key that is not known: use_rslora"),
    "LoKr's key": ({"decompose_both": True}, "a key that is not known: decompose_both"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is huge": ({"r": 10**19}, "r has the rank"),
    "r is a float": ({"r": 2.5}, r"Expected `int`.*\$\.r"),
    "r is absent": ({"r": None}, "missing required field `r`"),
    "alpha is 0": ({"alpha": 0}, "alpha has the alpha 0"),
    "alpha is huge": ({"alpha": 1e300}, r"alpha has the alpha 1e\+300"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": 1e9}}, "alpha_pattern has the alpha"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has the rank 0"),
    "expression as a pattern": ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has a key .*\(a\+\)\+\$"),
    "expression as alpha's": ({"alpha_pattern": {"q|k": 2}}, r"alpha_pattern has a key .*q\|k"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored; numbers are bounded."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's LoHaConfig is unknown here."""
    assert_every_key_is_judged(PeftLoHaConfig, LohaConfig, IGNORED_KEYS, SERVED_VALUES)
