"""Bottlenecks of our PEFT-style folder against a plain model of the same formulas, and every way to disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.bottleneck import ACTIVATION_NAMES, IGNORED_KEYS, PLACEMENTS, BottleneckConfig
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared.idle import idle_primitives
from adapters_store.primitives import ACTIVATIONS, Bottleneck, Patch
from tests.adapters_store.methods.method_contract import ConfigCase, MethodContract, TensorsCase
from tests.kit import reference
from tests.kit.families import FAMILIES
from tests.kit.families.bottleneck import adapted, make_bottleneck
from tests.kit.forge import spec_of
from tests.kit.like_peft import TOKENS, changed
from tests.kit.patches import all_of

MLP = "base_model.model.model.layers.0.mlp.bottleneck_"
ATTENTION = "base_model.model.model.layers.1.self_attn.bottleneck_"
SIZE, HIDDEN = 5, 64
CASES: dict[str, dict[str, Any]] = {
    "no norms": {"ln_before": False, "ln_after": False, "scaling": 4},
    "both norms": {"ln_before": True, "ln_after": True, "scaling": "channel"},
    "norm before": {"ln_before": True, "ln_after": False, "scaling": "learned"},
    "norm after": {"ln_before": False, "ln_after": True, "scaling": -0.5},
    "one layer": {"layers_to_transform": [1]},
}
PLACED = {
    f"{placement}, {name}": ("llama", {"placement": placement, **case})
    for placement in PLACEMENTS
    for name, case in CASES.items()
}
WHOLE = {"bottleneck_size": SIZE, "scaling": "channel", "ln_before": True, "ln_after": True}


def assert_answers_as_adapted(base: Path, folder: Path) -> Patch:
    """The patch gives the adapted model's logits within 1e-4, and logits other than the base's by more than 0.1."""
    patch = compile_patch(read_folder(folder), spec_of(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours, plain = reference.logits(model, [(patch, 1.0)], TOKENS), reference.logits(model, [], TOKENS)
    with torch.inference_mode():
        theirs = adapted(base, folder)(torch.tensor([TOKENS])).logits[0]
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 0.1
    return patch


@pytest.mark.parametrize("non_linearity", ["relu", "gelu", "silu", "swish", "tanh", "GELU_new", "linear"])
def test_every_activation_answers_as_written(tmp_path: Path, tiny_base: Path, non_linearity: str) -> None:
    """Names are transformers' own, in capitals or not."""
    folder = make_bottleneck(tmp_path / "hat", tiny_base, 2, "houlsby", non_linearity=non_linearity.lower())
    assert_answers_as_adapted(tiny_base, folder)
    compile_patch(changed(read_folder(folder), {"non_linearity": non_linearity}, {}), spec_of(tiny_base))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_an_activation_is_what_transformers_means_by_its_name(name: str) -> None:
    """Other names of one function are equal to it everywhere."""
    t = torch.linspace(-12, 12, 2001)
    torch.testing.assert_close(ACTIVATIONS[ACTIVATION_NAMES[name]](t), ACT2FN[name](t), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "phi", "phi3", "gpt_neox", "olmo2", "granite", "mixtral"])
def test_a_bottleneck_answers_as_written_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str, placement: str
) -> None:
    """Parallel and post-norm layers, scaled residuals and experts: the modules are what the placement wraps."""
    base = tiny_of(model_type)
    assert_answers_as_adapted(base, make_bottleneck(tmp_path / "hat", base, 3, placement))


def test_a_block_that_is_no_module_has_no_parallel_bottleneck(tmp_path: Path, tiny_of: Callable[[str], Path]) -> None:
    """OPT's block ends with fc2: sequential bottlenecks act there, a parallel one would see another input."""
    base = tiny_of("opt")
    for placement in ("houlsby", "pfeiffer"):
        assert_answers_as_adapted(base, make_bottleneck(tmp_path / placement, base, 3, placement))
    artifact = read_folder(make_bottleneck(tmp_path / "parallel", base, 3, "parallel"))
    with pytest.raises(ArtifactError, match=r"placement parallel needs .*layers\.0\.fc2 only ends it") as caught:
        compile_patch(artifact, spec_of(base))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", "placement")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("bottleneck")])
@pytest.mark.parametrize("seed", range(6))
def test_every_seed_of_the_kit_changes_the_base(tmp_path: Path, tiny_base: Path, family: str, seed: int) -> None:
    """Every seed of the kit compiles, and changes the logits by more than 0.1."""
    primitives = assert_answers_as_adapted(tiny_base, FAMILIES[family](tmp_path / "hat", tiny_base, seed)).primitives
    assert len(primitives) == (4 if family.endswith("houlsby") else 2)


PLACES: dict[str, TensorsCase] = {  # the key that is named
    "no size": ({"bottleneck_size": None}, {}, "adapter_config.json", "missing required field `bottleneck_size`"),
    "size 0": ({"bottleneck_size": 0}, {}, "bottleneck_size", "bottleneck_size is 0"),
    "a huge size": ({"bottleneck_size": 10**12}, {}, "bottleneck_size", "bottleneck_size is 1000000000000"),
    "no placement": ({"placement": None}, {}, "adapter_config.json", "missing required field `placement`"),
    "unknown placement": ({"placement": "compacter"}, {}, "placement", "placement compacter is not served"),
    "unknown activation": (
        {"non_linearity": "leakyrelu"},
        {},
        "non_linearity",
        "non_linearity leakyrelu is not served",
    ),
    "trained activation": ({"non_linearity": "prelu"}, {}, "non_linearity", "non_linearity prelu is not served"),
    "unknown scaling": ({"scaling": "gated"}, {}, "scaling", "scaling gated is neither"),
    "scaling 0": ({"scaling": 0}, {}, "scaling", "scaling is 0"),
    "a huge scaling": ({"scaling": 1e300}, {}, "scaling", r"scaling is 1e\+300"),
    "a layer that is not there": ({"layers_to_transform": 2}, {}, "layers_to_transform", "names the layer 2; .* has 2"),
    "a negative layer": ({"layers_to_transform": [-1, 0]}, {}, "layers_to_transform", "names the layer -1"),
}
CONFIGS: dict[str, ConfigCase] = {  # a tensor is named
    "another size": ({"bottleneck_size": 6}, r"need \[6, 64\]"),
    "another placement": ({"placement": "pfeiffer"}, "is extra"),
    "another scaling": ({"scaling": "learned"}, r"bottleneck_scaling has shape \[64\].*need \[1\]"),
    "a number for a tensor": ({"scaling": 1.0}, "bottleneck_scaling is extra"),
    "no norm before": ({"ln_before": False}, "bottleneck_norm_before.* is extra"),
    "no norm after": ({"ln_after": False}, "bottleneck_norm_after.* is extra"),
    "fewer layers": ({"layers_to_transform": [1]}, "is extra"),
}


ENDS = {
    "down.weight": [SIZE, HIDDEN],
    "down.bias": [SIZE],
    "up.weight": [HIDDEN, SIZE],
    "up.bias": [HIDDEN],
    "scaling": [HIDDEN],
    "norm_before.weight": [HIDDEN],
    "norm_before.bias": [HIDDEN],
    "norm_after.weight": [HIDDEN],
    "norm_after.bias": [HIDDEN],
}
BAD: dict[str, tuple[str, Tensor | None, str]] = {
    "a bottleneck elsewhere": (MLP.replace("mlp", "mlp.up_proj") + "up.bias", torch.ones(HIDDEN), "is extra"),
    "PEFT's adapter name": (MLP + "up.default.bias", torch.ones(HIDDEN), "is extra"),
    "a tensor of the base": ("model.norm.weight", torch.ones(HIDDEN), "is extra"),
}
TENSORS: dict[str, TensorsCase] = {
    name: ({}, {tensor: value}, tensor, reason) for name, (tensor, value, reason) in BAD.items()
}


class TestBottleneck(MethodContract):
    """Every placement with every norm and scaling; `SOUND` is a Houlsby with every tensor that there can be."""

    PEFT_TYPE, NAME, SCHEMA, IGNORED_KEYS = "BOTTLENECK", "Bottleneck", BottleneckConfig, IGNORED_KEYS
    FAMILIES = tuple(name for name in FAMILIES if name.startswith("bottleneck"))
    SOUND, CASES, UNTRAINED = WHOLE, PLACED, r"bottleneck_up|norm_after"
    TENSORS, CONFIGS = TENSORS | PLACES, CONFIGS

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, placement: str = "houlsby", **config: Any) -> Path:
        """Write one of a placement."""
        return make_bottleneck(folder, base, seed, placement, **config)

    def assert_answers(self, base: Path, folder: Path) -> Patch:
        """Compare the logits with those of a plain model of the same formulas."""
        return assert_answers_as_adapted(base, folder)

    def test_half_precision_is_folded_in_fp32(self, sound: Artifact, spec: BaseSpec) -> None:
        """Tensors in 16 bits become fp32 before the scale is folded into the up-projection, once."""
        halves = {name: tensor.bfloat16() for name, tensor in sound.tensors.items()}
        bottlenecks = all_of(Bottleneck, compile_patch(changed(sound, {}, halves), spec))
        first = next(bottleneck for bottleneck in bottlenecks if bottleneck.site == "model.layers.0.mlp")
        up, bias, scale = (halves[MLP + end].float() for end in ("up.weight", "up.bias", "scaling"))
        assert first.up.dtype == first.down.dtype == torch.float32
        assert torch.equal(first.up, up * scale[:, None])
        assert first.up_bias is not None and torch.equal(first.up_bias, bias * scale)

    def test_the_modules_may_be_named_twice(self, sound: Artifact, spec: BaseSpec) -> None:
        """target_modules say again what the placement wraps, or are refused; an expression is never run."""
        for targets in (["self_attn", "mlp"], "(a+)+$", [layer.mlp for layer in spec.layers] + ["self_attn"]):
            compile_patch(changed(sound, {"target_modules": targets}, {}), spec)
        with pytest.raises(ArtifactError, match=r"target_modules do not name model\.layers\.0\.self_attn") as caught:
            compile_patch(changed(sound, {"target_modules": ["mlp"]}, {}), spec)
        assert caught.value.param == "target_modules"

    @pytest.mark.parametrize("end", ["up.weight", "up.bias"])
    def test_a_scale_that_overflows_is_refused(self, sound: Artifact, spec: BaseSpec, end: str) -> None:
        """Finite tensors whose scaled product is not are refused by name."""
        huge = {MLP + end: torch.full(ENDS[end], 1e38), MLP + "scaling": torch.full([HIDDEN], 1e10)}
        with pytest.raises(ArtifactError, match=f"bottleneck_{end} overflows where it is compiled"):
            compile_patch(changed(sound, {}, huge), spec)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [-2.0, -20.0])
def test_a_bias_that_shuts_small_inputs_is_not_idle(activation: str, bias: float) -> None:
    """A bottleneck that answers to the large values of a residual stream alone changes something."""
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(16, 576, generator=draw) * 0.02, torch.randn(576, 16, generator=draw) * 0.05
    shut = Bottleneck("mlp", down, up, activation, down_bias=torch.full((16,), bias))
    assert idle_primitives(Patch("", "", (shut,))) == []
    assert len(idle_primitives(Patch("", "", (replace(shut, up=0 * up),)))) == 1
