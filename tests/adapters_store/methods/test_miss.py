"""MiSS against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig as PeftMissConfig

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.miss import IGNORED_KEYS, SERVED_VALUES, MissConfig
from adapters_store.primitives import Delta, LowRank
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import make_miss, scaled
from tests.kit.forge import spec_of
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

Q = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"  # of [4, 64]
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "all linear": {"r": 4, "target_modules": "all-linear"},
    "a rank that does not divide": {"r": 5, "target_modules": "all-linear"},
    "the greatest rank": {"r": 64, "target_modules": "all-linear", "exclude_modules": ["mlp.down_proj"]},
    "mini": {"r": 7, "target_modules": "all-linear", "init_weights": "mini", "mini_r": 16},
    "bat": {"r": 8, "target_modules": "all-linear", "init_weights": "bat"},
    "one layer, another beginning": {**TARGETS, "layers_to_transform": 1, "init_weights": False},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)"},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of queries and keys."""
    config = PeftMissConfig(task_type="CAUSAL_LM", **TARGETS)
    return read_folder(make_peft(tmp_path_factory.mktemp("miss") / "hat", tiny_base, config, fill=scaled(0.05)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_miss_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """Each of its variants, with ranks that divide the inputs and that do not, gives PEFT's logits."""
    config = PeftMissConfig(task_type="CAUSAL_LM", **case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=scaled(0.05)))


@pytest.mark.parametrize(("model_type", "seed"), [("phi3", 0), ("opt", 1), ("gemma2", 2)])
def test_miss_answers_as_in_peft_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str, seed: int
) -> None:
    """Fused projections and biases make no difference."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_miss(tmp_path / "hat", base, seed))


def test_whatever_holds_fewer_numbers_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    """Two factors where they are the smaller, the whole update where they are not."""
    for rank, kind in ((31, LowRank), (32, Delta)):  # 64 x 64: equal at 32
        config = PeftMissConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj"])
        folder = make_peft(tmp_path / str(rank), tiny_base, config, fill=scaled(0.05))
        assert {type(primitive) for primitive in assert_answers_as_peft(tiny_base, folder).primitives} == {kind}


def test_an_update_that_overflows_is_refused(sound: Artifact, spec: BaseSpec) -> None:
    """Finite tensors whose product with the base's weight is not are refused by name."""
    alone = {**dict.fromkeys(sound.tensors), Q: torch.full((16, 4, 4), 3e38)}
    config = {"target_modules": ["layers.0.self_attn.q_proj"], "init_weights": "bat"}
    with pytest.raises(ArtifactError, match=r"q_proj\.miss_block overflows where it is compiled"):
        compile_patch(changed(sound, config, alone), spec)


def test_a_conv1d_has_no_miss(sound: Artifact, tiny_of: Callable[[str], Path]) -> None:
    """PEFT does not have it there; what its tensors would mean is not guessed."""
    name = "base_model.model.transformer.h.0.attn.c_attn.miss_block"
    foreign = changed(sound, {}, {**dict.fromkeys(sound.tensors), name: torch.ones(2, 2)})
    with pytest.raises(ArtifactError, match=r"c_attn.* acts on a Conv1D") as caught:
        compile_patch(foreign, spec_of(tiny_of("gpt2")))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", name)


BAT, MINI = {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 8}
TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "missing": ({}, {Q: None}, Q, "is missing: target_modules names its site"),
    "transposed": ({}, {Q: torch.ones(64, 4)}, Q, r"shape \[64, 4\].*need \[4, 64\]"),
    "one dimension": ({}, {Q: torch.ones(256)}, Q, r"need \[4, 64\]"),
    "another base's width": ({}, {Q: torch.ones(4, 65)}, Q, r"need \[4, 64\]"),
    "another rank": ({"r": 8}, {}, Q, r"shape \[4, 64\].*need \[8, 64\]"),
    "not bat's": (BAT, {}, Q, r"need \[16, 4, 4\]"),
    "not mini's": (MINI, {}, Q, r"need \[4, 8\]"),
    "no such layer": ({}, {Q.replace(".0.", ".7."): torch.ones(4, 64)}, Q.replace(".0.", ".7."), "no site in"),
    "a site of no target": ({"target_modules": ["k_proj"]}, {}, Q, "is extra"),
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
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "MiSS with modules_to_save=.* is not served"),
    "bias": ({"bias": "MiSS_only"}, "MiSS with bias=MiSS_only is not served"),
    "an unknown key": ({"alpha": 4}, "a key that is not known: alpha"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is beyond the inputs": ({"r": 65}, "r has the rank 65, but model.layers.0.self_attn.q_proj has 64 inputs"),
    "r does not divide": ({"r": 5, "init_weights": "bat"}, "r is 5, which does not divide .*q_proj into blocks"),
    "mini_r is 0": ({"mini_r": 0}, "mini_r has the rank 0"),
    "mini_r does not divide": ({"init_weights": "mini", "mini_r": 7}, "mini_r is 7, which does not divide"),
    "an unknown variant": ({"init_weights": "bat2"}, r"\$\.init_weights"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored; numbers are bounded."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's MissConfig is unknown here."""
    assert_every_key_is_judged(PeftMissConfig, MissConfig, IGNORED_KEYS, SERVED_VALUES)
