"""VeRA against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig as PeftVeraConfig
from peft.tuners.vera.model import _kaiming_init

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
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
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import noise, vera_config
from tests.kit.like_peft import changed

SITE = "base_model.model.model.layers.{}.{}.vera_lambda_{}"
D, B = SITE.format(0, "self_attn.q_proj", "d"), SITE.format(0, "self_attn.q_proj", "b")  # of [4], [64]
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}  # A [4, 96], B [64, 4]
CASES: dict[str, Values] = {
    "all linear": {"r": 5, "target_modules": "all-linear"},
    "projections drawn again": {"r": 5, "target_modules": "all-linear", "save_projection": False},
    "drawn from another key": {**TARGETS, "save_projection": False, "projection_prng_key": 2**40 + 7},
    "drawn from a negative key": {**TARGETS, "save_projection": False, "projection_prng_key": -3},
    "another key": {**TARGETS, "projection_prng_key": 11},
    "one layer": {**TARGETS, "layers_to_transform": [1], "save_projection": False},
    "an expression": {"r": 3, "target_modules": r".*\.1\..*(k|up)_proj", "save_projection": False},
    "more than the rank of a site": {"r": 90, "target_modules": ["k_proj", "down_proj"], "save_projection": False},
}
TENSORS: dict[str, TensorsCase] = {
    "A is extra": ({"save_projection": False}, {B_NAME: None}, A_NAME, "is extra: the config has save_projection"),
    "B is extra": ({"save_projection": False}, {A_NAME: None}, B_NAME, "is extra: the config has save_projection"),
    "A is wider than any site": ({}, {A_NAME: torch.ones(4, 128)}, A_NAME, r"need \[4, 96\]"),
    "B is higher than any site": ({}, {B_NAME: torch.ones(96, 4)}, B_NAME, r"need \[64, 4\]"),
    "another rank": ({"r": 8}, {}, D, r"shape \[4\].*need \[8\]"),
    "overflow": ({}, {D: torch.full((4,), 3e38), B: torch.full((64,), 3e38)}, B, "overflows where it is compiled"),
}
CONFIGS: dict[str, ConfigCase] = {
    "an unknown key": ({"use_rslora": True}, "a key that is not known: use_rslora"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is huge": ({"r": MAX_RANK + 1}, "r has the rank 4097"),
    "r is absent": ({"r": None}, "missing required field `r`"),
    "the key has 65 bits": ({"projection_prng_key": 2**64}, "projection_prng_key is no seed"),
    "the key is too negative": ({"projection_prng_key": -(2**63) - 1}, "projection_prng_key is no seed"),
}


class TestVera(LinearContract):
    """Projections are saved, as in `SOUND`, or drawn again from the key."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "VERA", "VeRA", PeftVeraConfig, VeraConfig
    IGNORED_KEYS, SERVED_VALUES, FILL, SOUND = IGNORED_KEYS, SERVED_VALUES, staticmethod(noise), TARGETS
    FAMILIES, FAMILY_ON = ["vera"], [("gpt2", 1), ("phi3", 1), ("opt", 1)]
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one without PEFT's warning that other systems may draw other projections."""
        return make_peft(folder, base, vera_config(**config), seed, cls.FILL)

    def test_whatever_holds_fewer_numbers_is_kept(self, tmp_path: Path, tiny_base: Path) -> None:
        """Two factors are kept if they have fewer numbers, else the full update."""
        for rank, kind in ((31, LowRank), (32, Delta)):  # 64 x 64: equal at 32
            config: dict[str, Any] = {"r": rank, "target_modules": ["q_proj"], "save_projection": False}
            folder = self.make(tmp_path / str(rank), tiny_base, **config)
            assert {type(primitive) for primitive in self.assert_answers(tiny_base, folder).primitives} == {kind}

    def test_half_precision_is_folded_in_fp32(self, sound: Artifact, spec: BaseSpec) -> None:
        """Tensors in 16 bits become fp32 before they are multiplied."""
        halves = {name: tensor.bfloat16() for name, tensor in sound.tensors.items()}
        (first, *_) = compile_patch(changed(sound, {}, halves), spec).primitives
        assert isinstance(first, LowRank)
        d, b = (halves[f"base_model.model.{first.site}.vera_lambda_{end}"].float() for end in "db")
        assert torch.equal(first.b, b[:, None] * halves[B_NAME].float()[: len(b)] * d)
        assert first.a.dtype == torch.float32

    def test_an_artifact_of_projections_alone_is_refused(self, sound: Artifact, spec: BaseSpec) -> None:
        """An artifact without trained tensors would answer as the base: refused."""
        names = set(sound.tensors) - {A_NAME, B_NAME}
        with pytest.raises(ArtifactError, match="vera_lambda_b is missing: target_modules names its site"):
            compile_patch(changed(sound, {}, dict.fromkeys(names)), spec)
        with pytest.raises(ArtifactError, match="no tensors"):
            compile_patch(changed(sound, {"target_modules": ".*"}, dict.fromkeys(names)), spec)


@pytest.mark.parametrize(("key", "rank", "width", "height"), [(0, 1, 1, 1), (7, 256, 96, 64), (-1, 3, 2000, 5)])
def test_projections_are_drawn_bit_for_bit(key: int, rank: int, width: int, height: int) -> None:
    """The same key and sizes give PEFT's own numbers."""
    generator = torch.Generator("cpu").manual_seed(key)
    expected = [_kaiming_init(shape, generator) for shape in ((rank, width), (height, rank))]
    assert all(torch.equal(*pair) for pair in zip(draw_projections(key, rank, width, height), expected, strict=True))
