"""OFT against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import OFTConfig as PeftOFTConfig
from peft.tuners.oft.layer import OFTLayer

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.oft import IGNORED_KEYS, MAX_TERMS, SERVED_VALUES, OftConfig, nearest_divisor
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import make_oft, scaled
from tests.kit.forge import spec_of
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

Q = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"  # of [8, 28]
TARGETS: dict[str, Any] = {"oft_block_size": 8, "target_modules": ["q_proj", "k_proj"]}
ALL: dict[str, Any] = {**TARGETS, "target_modules": "all-linear"}
CASES: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "a number of blocks": {**ALL, "r": 4, "oft_block_size": 0},
    "a number of blocks that does not divide": {**ALL, "r": 5, "oft_block_size": 0},
    "a size that does not divide": {**ALL, "oft_block_size": 7},
    "one block": {**TARGETS, "oft_block_size": 100},
    "blocks all alike": {**ALL, "block_share": True},
    "exact": {**ALL, "use_cayley_neumann": False},
    **{f"{terms} terms": {**ALL, "num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6)},
    "one layer, another beginning": {**TARGETS, "layers_to_transform": [1], "init_weights": False, "eps": 1.0},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)", "module_dropout": 0.2},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of queries and keys."""
    config = PeftOFTConfig(task_type="CAUSAL_LM", **TARGETS)
    return read_folder(make_peft(tmp_path_factory.mktemp("oft") / "hat", tiny_base, config, fill=scaled(0.06)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_oft_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """Rotations by the series or exact, in blocks of any size, of their own or all alike, give PEFT's logits."""
    config = PeftOFTConfig(task_type="CAUSAL_LM", **case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=scaled(0.06)))


@pytest.mark.parametrize(("model_type", "seed"), [("phi3", 3), ("opt", 2), ("gemma2", 1)])
def test_oft_answers_as_in_peft_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str, seed: int
) -> None:
    """Fused projections and biases make no difference."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_oft(tmp_path / "hat", base, seed))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400))
def test_sizes_are_adjusted_as_in_peft(number: int, wanted: int) -> None:
    """A size that does not divide the inputs becomes PEFT's."""
    is_fit = number % wanted == 0 and wanted <= number
    expected = wanted if is_fit else OFTLayer.adjust_oft_parameters(None, number, wanted)
    assert nearest_divisor(number, wanted) == expected


def test_a_conv1d_has_no_oft(sound: Artifact, tiny_of: Callable[[str], Path]) -> None:
    """PEFT does not have it there; what its tensors would mean is not guessed."""
    name = "base_model.model.transformer.h.0.attn.c_attn.oft_R.weight"
    foreign = changed(sound, {}, {**dict.fromkeys(sound.tensors), name: torch.ones(2, 2)})
    with pytest.raises(ArtifactError, match=r"c_attn.* acts on a Conv1D") as caught:
        compile_patch(foreign, spec_of(tiny_of("gpt2")))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", name)


TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "missing": ({}, {Q: None}, Q, "is missing: target_modules names its site"),
    "transposed": ({}, {Q: torch.ones(28, 8)}, Q, r"shape \[28, 8\].*need \[8, 28\]"),
    "one dimension": ({}, {Q: torch.ones(224)}, Q, r"need \[8, 28\]"),
    "another size": ({"oft_block_size": 16}, {}, Q, r"need \[4, 120\]"),
    "shared": ({"block_share": True}, {}, Q, r"need \[1, 28\]"),
    "another base's width": ({}, {Q: torch.ones(9, 28)}, Q, r"need \[8, 28\]"),
    "no such layer": ({}, {Q.replace(".0.", ".7."): torch.ones(8, 28)}, Q.replace(".0.", ".7."), "no site in"),
    "an old one": ({}, {Q.replace("R.weight", "r"): torch.ones(8, 8, 8)}, Q.replace("R.weight", "r"), "no site in"),
    "a site of no target": ({"target_modules": ["k_proj"]}, {}, Q, "is extra"),
    "overflow": ({}, {Q: torch.full((8, 28), 1e20)}, Q, "overflows where it is"),
}


@pytest.mark.parametrize(("config", "tensors", "name", "reason"), TENSORS.values(), ids=TENSORS)
def test_config_tensors_and_base_must_agree(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], tensors: dict[str, Any], name: str, reason: str
) -> None:
    """A tensor without its site, a site without its tensor, a wrong shape or rank: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(sound, config, tensors), spec)
    assert (caught.value.param, name in str(caught.value)) == (name, True)


BOTH = "of r and oft_block_size exactly one must be above 0"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "OFT with modules_to_save=.* is not served"),
    "bias": ({"bias": "oft_only"}, "OFT with bias=oft_only is not served"),
    "coft": ({"coft": True}, "OFT with coft=True is not served"),
    "an unknown key": ({"alpha": 4}, "a key that is not known: alpha"),
    "an old config": ({"oft_block_size": None}, "missing required field `oft_block_size`"),
    "both": ({"r": 4}, BOTH),
    "neither": ({"oft_block_size": 0}, BOTH),
    "r is negative": ({"r": -4, "oft_block_size": 0}, BOTH),
    "the size is negative": ({"oft_block_size": -8, "r": 4}, BOTH),
    "no terms": ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is not between 1 and 100"),
    "too many terms": ({"num_cayley_neumann_terms": MAX_TERMS + 1}, "num_cayley_neumann_terms is not between"),
    "no version": ({"peft_version": None}, "of a PEFT before 0.18 is another rotation"),
    "an old version": ({"peft_version": "0.17.2"}, "of a PEFT before 0.18 is another rotation"),
    "a text as a version": ({"peft_version": "new"}, "of a PEFT before 0.18 is another rotation"),
    "a list as a version": ({"peft_version": [0, 21]}, "of a PEFT before 0.18 is another rotation"),
}


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", "0.19.0.dev0@ab12", "1.0"])
def test_later_versions_of_peft_turn_alike(sound: Artifact, spec: BaseSpec, version: str) -> None:
    """The series is what it is since 0.18; the exact rotation always was."""
    compile_patch(changed(sound, {"peft_version": version}, {}), spec)
    compile_patch(changed(sound, {"peft_version": "0.16.0", "use_cayley_neumann": False}, {}), spec)


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored; numbers are bounded."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's OFTConfig is unknown here."""
    assert_every_key_is_judged(PeftOFTConfig, OftConfig, IGNORED_KEYS, SERVED_VALUES)
