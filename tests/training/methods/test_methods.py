"""Methods: the meaning of their options, and their artifacts before and after training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store.format.folder import read_folder
from tests.training.conftest import flags
from training.base import Base, load_base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods import METHODS, attach, options_of
from training.methods.soft_prompts import default_text, text_ids

PROMPT = [82, 101, 100, 32, 105, 115, 58]
ROWS = [
    TokenizedRow((*b"Colour: red", 10, *b"warm", 257), 12, 1),
    TokenizedRow((*b"Colour: blue", 10, *b"cold", 257), 13, 2),
]


@pytest.fixture
def base(biased_base: Path) -> Base:
    """A base of its own, which a method may change."""
    return load_base(str(biased_base), "cpu", None, lambda _message: None)


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> Tensor:
    """Return the logits of the last position."""
    found: Tensor = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return found


def adapter_of(name: str, base: Base, **given: Any) -> Any:
    return attach(name, options_of(name, given), base, ROWS, seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_is_not_read_is_refused_by_name(name: str) -> None:
    """Every method refuses an option of another's, and says what it reads itself."""
    other = "num_ranks" if name != "multitask_prompt_tuning" else "r"
    with pytest.raises(OptionError, match=f"--{other.replace('_', '-')} is not an option of --method {name}, which"):
        options_of(name, {other: 1})


@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "pissa", "olora", "vera", "loha", "lokr", "miss", "oft", "bottleneck", "ia3", "beft", "selective"],
)
def test_a_hat_begins_as_the_base(name: str, base: Base) -> None:
    """Before its first step a method that adds to the base answers as the base does."""
    plain = logits(base.model, PROMPT)
    assert torch.allclose(logits(adapter_of(name, base).model, PROMPT), plain, atol=1e-4)


@pytest.mark.parametrize("name", ["prompt_tuning", "multitask_prompt_tuning", "prefix_tuning", "cartridge"])
@pytest.mark.parametrize("text", ["", "Say how a colour feels."])
def test_a_soft_prompt_begins_as_a_text(name: str, text: str, base: Base) -> None:
    """Before its first step a soft prompt answers as the base does behind its text, by default one of the answers."""
    beginning = text or default_text(base, ROWS)
    assert text or beginning == "Classify the text. Answer with one of: warm, cold."
    wanted = logits(base.model, [*text_ids(beginning, 20, base), *PROMPT])
    given = {"init_text": text} if text else {}
    assert torch.allclose(logits(adapter_of(name, base, **given).model, PROMPT), wanted, atol=1e-4)


def test_cpt_begins_as_its_context(base: Base) -> None:
    """The context is the first rows that fit whole, each with its answer and a line's end."""
    context = [*ROWS[0].ids[:-1], 10]
    adapter = adapter_of("cpt", base, num_virtual_tokens=30)
    assert adapter.config()["cpt_token_ids"] == context
    assert torch.allclose(logits(adapter.model, PROMPT), logits(base.model, [*context, *PROMPT]), atol=1e-4)


@pytest.mark.parametrize("layers", ["0", "last:1", "all"])
@pytest.mark.parametrize("name", ["lora", "bottleneck", "ia3", "ln_tuning", "beft", "bitfit", "selective", "oft"])
def test_layers_are_the_ones_that_are_trained(name: str, layers: str, base: Base) -> None:
    """--layers says in which layers a method has parameters."""
    adapter = adapter_of(name, base, layers=layers)
    found = {number for number in (0, 1) for tensor in adapter.tensors() if f".layers.{number}." in tensor}
    assert found == {"0": {0}, "last:1": {1}, "all": {0, 1}}[layers]


def test_bitfit_gives_biases_to_a_base_without(tiny_base: Path) -> None:
    """A llama has no biases to train: bitfit adds them, as BEFT writes them."""
    llama = load_base(str(tiny_base), "cpu", None, lambda _message: None)
    assert adapter_of("bitfit", llama).config()["peft_type"] == "BEFT"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_weights_is_written_as_plain_lora(
    init: str, dtype: torch.dtype, base: Base, biased_base: Path
) -> None:
    """PiSSA and OLoRA answer the same as a plain LoRA of twice the rank on the base as it is."""
    adapter = adapter_of(init, base, r=2, layers="all")
    with torch.no_grad():
        for parameter in adapter.trained():
            parameter += 0.05 * torch.randn(parameter.shape)
    adapter.finalize(dtype)
    config, tensors = adapter.config(), adapter.tensors()
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    model = load_base(str(biased_base), "cpu", None, lambda _message: None).model
    plain, scale = logits(model, PROMPT), config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                weight = model.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
                weight += scale * tensors[name.replace("lora_A", "lora_B")] @ a
    assert all(torch.equal(tensor, tensor.to(dtype).float()) for tensor in tensors.values())
    ours = logits(adapter.model, PROMPT)
    assert torch.allclose(ours, logits(model, PROMPT), atol=1e-3) and not torch.allclose(ours, plain, atol=0.1)


OPENED = [name for name in METHODS if name not in ("bitfit", "selective", "full")]


@pytest.mark.parametrize("name", OPENED)
def test_peft_opens_what_was_written(
    name: str, biased_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """`PeftModel.from_pretrained` gives the manifest's logits, also for fp16, and for the type that we registered."""
    more = ["--steps", 2, "--lr", 0.05, "--method", name, "--save-dtype", "fp16"]
    result = command(*flags(biased_base, data, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased_base), tmp_path / "out")
    more_inputs = {"task_ids": torch.tensor([0])} if name == "multitask_prompt_tuning" else {}
    for case in manifest.parity:
        with torch.inference_mode():
            found = model.eval()(input_ids=torch.tensor([case.prompt_token_ids]), **more_inputs).logits[0, -1]
        tokens = [token for token, _ in case.top]
        assert found[tokens].tolist() == pytest.approx([logit for _, logit in case.top], abs=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if "target_modules" in METHODS[name].options.names()])
def test_a_module_that_is_none_is_named(name: str, base: Base) -> None:
    """Every method that takes names of modules refuses one that no module of the base has, beside others that are."""
    with pytest.raises(OptionError, match="--target-modules names 'q_prj'"):
        adapter_of(name, base, target_modules="q_proj,q_prj")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 0}, "--r must be"),
    ("lora", {"layers": "7"}, "--layers '7'"),
    ("lora", {"target_modules": "nothing"}, "nothing"),
    ("bottleneck", {"placement": "sideways"}, "--placement sideways"),
    ("bottleneck", {"non_linearity": "step"}, "--non-linearity step"),
    ("bottleneck", {"scaling": "much"}, "--scaling much"),
    ("bottleneck", {"bottleneck_size": 0}, "--bottleneck-size must"),
    ("prompt_tuning", {"num_virtual_tokens": 0}, "--num-virtual-tokens must"),
    ("prefix_tuning", {"prefix_projection": True, "init_text": "a"}, "--init-text cannot"),
    ("cartridge", {"num_virtual_tokens": 2, "num_frozen_tokens": 2}, "--num-frozen-tokens must"),
    ("p_tuning", {"encoder_reparameterization_type": "GRU"}, "--encoder-reparameterization-type must"),
    ("multitask_prompt_tuning", {"num_ranks": 0}, "--num-ranks must"),
    ("ia3", {"target_modules": "nothing"}, "names 'nothing'"),
    ("ia3", {"target_modules": "k_proj", "feedforward_modules": "down_proj"}, "--feedforward-modules names"),
    ("selective", {"parameters": "nothing"}, "--parameters names 'nothing'"),
    ("selective", {"parameters": "model.norm", "layers": "0"}, "leaves nothing to train"),
    ("trainable_tokens", {"token_indices": "a"}, "--token-indices 'a'"),
    ("trainable_tokens", {"token_indices": "5-999"}, "0 to 258"),
]


@pytest.mark.parametrize(("name", "given", "sentence"), BAD)
def test_an_option_that_cannot_be_meant_is_named(name: str, given: dict[str, Any], sentence: str, base: Base) -> None:
    """A value that no base or method can have is refused in a sentence that names the option."""
    with pytest.raises(OptionError, match=sentence.replace("(", r"\(")):
        adapter_of(name, base, **given)
