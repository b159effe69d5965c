"""VeRA against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig as PeftVeraConfig
from peft.tuners.vera.model import _kaiming_init

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.vera import (
    A_NAME,
    B_NAME,
    IGNORED_KEYS,
    MAX_RANK,
    SERVED_VALUES,
    VeraConfig,
    draw_projections,
)
from adapters_store.primitives import Delta, LowRank
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import make_vera, noise, vera_config
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

SITE = "base_model.model.model.layers.{}.{}.vera_lambda_{}"
D, B = SITE.format(0, "self_attn.q_proj", "d"), SITE.format(0, "self_attn.q_proj", "b")  # of [4], [64]
DOWN = SITE.format(0, "mlp.down_proj", "b")
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}  # A [4, 96], B [64, 4]
CASES: dict[str, dict[str, Any]] = {
    "all linear": {"r": 5, "target_modules": "all-linear"},
    "projections drawn again": {"r": 5, "target_modules": "all-linear", "save_projection": False},
    "drawn from another key": {**TARGETS, "save_projection": False, "projection_prng_key": 2**40 + 7},
    "drawn from a negative key": {**TARGETS, "save_projection": False, "projection_prng_key": -3},
    "another key": {**TARGETS, "projection_prng_key": 11},
    "one layer": {**TARGETS, "layers_to_transform": [1], "save_projection": False},
    "an expression": {"r": 3, "target_modules": r".*\.1\..*(k|up)_proj", "save_projection": False},
    "more than the rank of a site": {"r": 90, "target_modules": ["k_proj", "down_proj"], "save_projection": False},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of queries and down projections, with its projections."""
    config = vera_config(**TARGETS)
    return read_folder(make_peft(tmp_path_factory.mktemp("vera") / "hat", tiny_base, config, fill=noise))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_vera_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """With projections that are saved, or drawn again from the key, PEFT's logits."""
    config = vera_config(**case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=noise))


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "opt"])
def test_vera_answers_as_in_peft_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str
) -> None:
    """Transposed weights and fused projections take the same products."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_vera(tmp_path / "hat", base, seed=1))


@pytest.mark.parametrize(("key", "rank", "width", "height"), [(0, 1, 1, 1), (7, 256, 96, 64), (-1, 3, 2000, 5)])
def test_projections_are_drawn_bit_for_bit(key: int, rank: int, width: int, height: int) -> None:
    """The same key and sizes give PEFT's own numbers."""
    generator = torch.Generator("cpu").manual_seed(key)
    expected = [_kaiming_init(shape, generator) for shape in ((rank, width), (height, rank))]
    assert all(torch.equal(*pair) for pair in zip(draw_projections(key, rank, width, height), expected, strict=True))


def test_whatever_holds_fewer_numbers_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    """Factors where they are the smaller, the whole update where the rank is too high for that."""
    for rank, kind in ((31, LowRank), (32, Delta)):  # 64 x 64: equal at 32
        config = vera_config(r=rank, target_modules=["q_proj"], save_projection=False)
        folder = make_peft(tmp_path / str(rank), tiny_base, config, fill=noise)
        assert {type(primitive) for primitive in assert_answers_as_peft(tiny_base, folder).primitives} == {kind}


def test_half_precision_is_folded_in_fp32(sound: Artifact, spec: BaseSpec) -> None:
    """Tensors in 16 bits become fp32 before they are multiplied."""
    halves = {name: tensor.bfloat16() for name, tensor in sound.tensors.items()}
    (first, *_) = compile_patch(changed(sound, {}, halves), spec).primitives
    assert isinstance(first, LowRank)
    d, b = (halves[f"base_model.model.{first.site}.vera_lambda_{end}"].float() for end in "db")
    assert torch.equal(first.b, b[:, None] * halves[B_NAME].float()[: len(b)] * d)
    assert first.a.dtype == torch.float32


TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "d is missing": ({}, {D: None}, D, "is missing"),
    "b is missing": ({}, {B: None}, B, "is missing"),
    "a site is missing": ({}, {D: None, B: None}, B, "is missing: target_modules names its site"),
    "A is missing": ({}, {A_NAME: None}, A_NAME, "is missing"),
    "B is missing": ({}, {B_NAME: None}, B_NAME, "is missing"),
    "A is extra": ({"save_projection": False}, {B_NAME: None}, A_NAME, "is extra: the config has save_projection"),
    "B is extra": ({"save_projection": False}, {A_NAME: None}, B_NAME, "is extra: the config has save_projection"),
    "A is transposed": ({}, {A_NAME: torch.ones(96, 4)}, A_NAME, r"shape \[96, 4\].*need \[4, 96\]"),
    "B is transposed": ({}, {B_NAME: torch.ones(4, 64)}, B_NAME, r"need \[64, 4\]"),
    "A is wider than any site": ({}, {A_NAME: torch.ones(4, 128)}, A_NAME, r"need \[4, 96\]"),
    "B is higher than any site": ({}, {B_NAME: torch.ones(96, 4)}, B_NAME, r"need \[64, 4\]"),
    "d is a matrix": ({}, {D: torch.ones(4, 1)}, D, r"shape \[4, 1\].*need \[4\]"),
    "another base's width": ({}, {B: torch.ones(65)}, B, r"shape \[65\].*need \[64\]"),
    "another rank": ({"r": 8}, {}, D, r"shape \[4\].*need \[8\]"),
    "no such layer": ({}, {D.replace(".0.", ".7."): torch.ones(4)}, D.replace(".0.", ".7."), "no site in"),
    "a bias": ({}, {D.replace("vera_lambda_d", "bias"): torch.ones(64)}, D.replace("vera_lambda_d", "bias"), "no site"),
    "a site of no target": ({"target_modules": ["down_proj"]}, {}, B, "is extra"),
    "a layer of no target": ({"layers_to_transform": [1]}, {}, DOWN, "is extra"),
    "overflow": ({}, {D: torch.full((4,), 3e38), B: torch.full((64,), 3e38)}, B, "overflows where it is compiled"),
}


@pytest.mark.parametrize(("config", "tensors", "name", "reason"), TENSORS.values(), ids=TENSORS)
def test_config_tensors_and_base_must_agree(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], tensors: dict[str, Any], name: str, reason: str
) -> None:
    """A tensor without its site, a site without its tensor, a wrong shape or rank: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(sound, config, tensors), spec)
    assert (caught.value.param, name in str(caught.value)) == (name, True)


def test_an_artifact_of_projections_alone_is_refused(sound: Artifact, spec: BaseSpec) -> None:
    """A hat that would be the base is no hat."""
    names = set(sound.tensors) - {A_NAME, B_NAME}
    with pytest.raises(ArtifactError, match="vera_lambda_b is missing: target_modules names its site"):
        compile_patch(changed(sound, {}, dict.fromkeys(names)), spec)
    with pytest.raises(ArtifactError, match="no tensors"):
        compile_patch(changed(sound, {"target_modules": ".*"}, dict.fromkeys(names)), spec)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "vera_only"}, "VeRA with bias=vera_only is not served"),
    "all biases": ({"bias": "all"}, "VeRA with bias=all is not served"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "VeRA with modules_to_save=.* is not served"),
    "an unknown key": ({"use_rslora": True}, "a key that is not known: use_rslora"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is huge": ({"r": MAX_RANK + 1}, "r has the rank 4097"),
    "r is absent": ({"r": None}, "missing required field `r`"),
    "r is a text": ({"r": "4"}, r"\$\.r"),
    "the key is a text": ({"projection_prng_key": "0"}, r"\$\.projection_prng_key"),
    "the key has 65 bits": ({"projection_prng_key": 2**64}, "projection_prng_key is no seed"),
    "the key is too negative": ({"projection_prng_key": -(2**63) - 1}, "projection_prng_key is no seed"),
    "save_projection is a number": ({"save_projection": 1}, r"\$\.save_projection"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored; numbers are bounded."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's VeraConfig is unknown here."""
    assert_every_key_is_judged(PeftVeraConfig, VeraConfig, IGNORED_KEYS, SERVED_VALUES)
