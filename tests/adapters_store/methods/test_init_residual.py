"""PiSSA and OLoRA against PEFT itself: on the base that they changed, and converted to a plain LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared import init_residual
from adapters_store.methods.shared.idle import idle_primitives
from adapters_store.primitives import Bias, LowRank
from tests.kit import reference
from tests.kit.adapters import make_peft
from tests.kit.families import loras
from tests.kit.forge import spec_of
from tests.kit.like_peft import TOKENS, assert_answers_as_peft, changed

TinyOf = Callable[[str], Path]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa, rsLoRA and patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"o_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "pissa of the whole rank": ("llama", {"init_lora_weights": "pissa", "r": 32, "target_modules": ["k_proj"]}),
    "pissa on Conv1D": ("gpt2", {"init_lora_weights": "pissa"}),
    "pissa, new biases": ("opt", {"init_lora_weights": "pissa", "bias": "all"}),
    "olora": ("llama", {"init_lora_weights": "olora", "lora_alpha": 6}),
    "OLoRA, rsLoRA and patterns": (
        "qwen2",
        {"init_lora_weights": "OLoRA", "use_rslora": True, "rank_pattern": {"o_proj": 7}},
    ),
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")
@pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES)
def test_an_initialisation_that_changed_the_base_answers_as_in_peft(
    tiny_of: TinyOf, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """What PEFT takes off the base when it loads the folder is taken off by twice the rank."""
    lora = loras.config(**{"target_modules": ["v_proj", "o_proj", "c_proj", "out_proj"], **config})
    patch = assert_answers_as_peft(tiny_of(kind), loras.make(tmp_path / "hat", tiny_of(kind), lora, len(kind)))
    ranks = {p.rank for p in patch.primitives if isinstance(p, LowRank)}
    assert all(rank % 2 == 0 for rank in ranks) and min(ranks) >= 2 * min(config.get("r", 4), 4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_trained_and_converted_are_one(tiny_of: TinyOf, tmp_path: Path, init: str) -> None:
    """The folder as training saves it, and the plain LoRA that PEFT converts it to, answer as the trained model."""
    base = tiny_of("llama")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = loras.config(init_lora_weights=init, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        _save_initial(model, tmp_path / "initial")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += loras.fill(name, parameter.clone(), generator)
        model.save_pretrained(tmp_path / "trained")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
        theirs = model.eval()(torch.tensor([TOKENS])).logits[0]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name in ("trained", "converted"):
        artifact = read_folder(tmp_path / name)
        assert artifact.config["init_lora_weights"] == (init if name == "trained" else True)
        ours = reference.logits(stock, [(compile_patch(artifact, spec_of(base)), 1.0)], TOKENS)
        assert (ours - theirs).abs().max() < 2e-4


def _save_initial(model: PeftModel, folder: Path) -> None:
    """Save the initial adapter as PEFT's guide does, its config stating a plain one."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(folder)
    config.init_lora_weights = init


@pytest.fixture(scope="module")
def pissa(tiny_of: TinyOf, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """PiSSA of rank 4 on the tiny llama's keys [32, 64]."""
    lora = loras.config(init_lora_weights="pissa", target_modules=["k_proj"])
    return read_folder(loras.make(tmp_path_factory.mktemp("pissa") / "hat", tiny_of("llama"), lora))


def test_what_takes_too_long_is_refused(tiny_of: TinyOf, pissa: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions are bounded, by a sentence that says how to convert the artifact elsewhere."""
    spec = spec_of(tiny_of("llama"))
    monkeypatch.setattr(init_residual, "MAX_WORK", 2 * 32**3)
    compile_patch(pissa, spec)
    monkeypatch.setattr(init_residual, "MAX_WORK", 2 * 32**3 - 1)
    with pytest.raises(ArtifactError, match=r"too long to convert here: save with path_initial_model") as caught:
        compile_patch(pissa, spec)
    assert (caught.value.code, caught.value.param) == ("method_unsupported", "init_lora_weights")


def test_what_cannot_be_is_refused(tiny_of: TinyOf, pissa: Artifact) -> None:
    """A rank beyond the matrix, the root of a negative number, and biases that PEFT would not have."""
    spec = spec_of(tiny_of("llama"))
    tensors = {name: torch.ones(33, 64) if "_A" in name else torch.ones(32, 33) for name in pissa.tensors}
    with pytest.raises(ArtifactError, match=r"rank 33 is impossible at model\.layers\.0\.self_attn\.k_proj, of 32"):
        compile_patch(changed(pissa, {"r": 33}, tensors), spec)
    with pytest.raises(ArtifactError, match="negative lora_alpha"):
        compile_patch(changed(pissa, {"lora_alpha": -4}, {}), spec)
    with pytest.raises(ArtifactError, match="PEFT has no lora_bias with use_dora, pissa or olora"):
        compile_patch(changed(pissa, {"lora_bias": True}, {}), spec)


def test_olora_on_conv1d_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """PEFT's OLoRA takes Conv1D's weight for one that is not transposed: what that means is not served."""
    base = tiny_of("gpt2")
    artifact = read_folder(loras.make(tmp_path / "hat", base, loras.config(target_modules=["attn.c_proj"])))
    with pytest.raises(ArtifactError, match=r"olora on Conv1D is not served: save with path_initial_model"):
        compile_patch(replace(artifact, config={**artifact.config, "init_lora_weights": "olora"}), spec_of(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"init_lora_weights": "pissa"}),
        ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}),
        ("llama", {"init_lora_weights": "olora", "lora_alpha": 6}),
        ("qwen2", {"init_lora_weights": "OLoRA", "r": 1}),
        ("llama", {"use_dora": True}),
        ("qwen2", {"use_dora": True, "target_modules": ["q_proj"]}),  # which has biases
    ],
)
def test_what_rounding_leaves_of_nothing_is_idle(
    tiny_of: TinyOf, tmp_path: Path, kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Saved before training, in any precision, an adapter that is a difference is found idle; trained a little, not."""
    config = loras.config(**{"target_modules": ["v_proj", "down_proj"], **options})
    folder = make_peft(tmp_path / "hat", tiny_of(kind), config, 0, lambda _name, value, _: value)
    spec, artifact = spec_of(tiny_of(kind)), read_folder(folder)
    half = torch.finfo(dtype).eps / 2  # of a number's size
    saved = {name: (tensor * (1 + half / 8)).to(dtype) for name, tensor in artifact.tensors.items()}
    patch = compile_patch(changed(artifact, {}, saved), spec)
    item_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    idle = idle_primitives(patch, item_dtype, dtype)
    if dtype == torch.float32:
        assert idle == list(patch.primitives)
    else:  # a base's bias, times what fewer bits make of a magnitude, stays
        assert idle == [one for one in patch.primitives if not isinstance(one, Bias)]
    generator = torch.Generator().manual_seed(1)
    noise = {
        n: torch.randn(t.shape, generator=generator) * t.std().clamp(min=0.01) for n, t in artifact.tensors.items()
    }
    trained = {name: (tensor + 0.05 * noise[name]).to(dtype) for name, tensor in artifact.tensors.items()}
    assert idle_primitives(compile_patch(changed(artifact, {}, trained), spec), item_dtype, dtype) == []
