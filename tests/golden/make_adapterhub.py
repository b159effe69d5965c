"""Make the golden artifacts and answers of AdapterHub: `ahub/bin/python -m tests.golden.make_adapterhub`.

The library `adapters` pins an older transformers, so it has an environment of its own, in one command:
`python3 -m venv ahub && ahub/bin/pip install adapters==1.3.0 transformers==4.57.6 torch==2.13.0`.

The oracle is `adapters` alone, on tiny bases that `tests.kit.tiny` makes in that environment: fp32, one prompt at a
time, and `use_cache=False`, because its `generate` on Llama is wrong with a cache. The files are committed (some 0.4
MB), so that no test needs the library.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.kit.tiny import make_tiny_base

HERE = Path(__file__).parent / "adapterhub"
ANSWERS = HERE / "golden.json"
NAME = "hat"
NUM_TOKENS = 24
LEAST_MARGIN = 1e-3  # of a token above the next best one's logit, so that rounding chooses nothing
PROMPTS = ["Hat?", "One base, many hats.", "The quick brown fox jumps over the lazy dog, again and again and again."]

# AdapterHub's class of the config and what is changed of its defaults, by artifact, by base.
Cases = dict[str, tuple[str, dict[str, Any]]]
COMMON: Cases = {
    "houlsby": ("DoubleSeqBnConfig", {}),
    "pfeiffer": ("SeqBnConfig", {"leave_out": [0], "non_linearity": "gelu_new", "reduction_factor": 8}),
    "parallel": ("ParBnConfig", {"reduction_factor": 4}),
}
CASES: dict[str, Cases] = {
    "llama": {
        **COMMON,
        "houlsby-norms": ("DoubleSeqBnConfig", {"ln_before": True, "ln_after": True, "non_linearity": "gelu"}),
        "houlsby-attention": (
            "DoubleSeqBnConfig",
            {"output_adapter": False, "non_linearity": "tanh", "residual_before_ln": False},
        ),
        "pfeiffer-factors": (
            "SeqBnConfig",
            {
                "reduction_factor": {"0": 64, "default": 3.4},
                "scaling": "learned",
                "adapter_residual_before_ln": True,  # without a norm after, it says nothing
            },
        ),
        "pfeiffer-norm": ("SeqBnConfig", {"ln_after": True, "scaling": "channel"}),
        "plus": ("AdapterPlusConfig", {"stochastic_depth": 0.0, "reduction_factor": 9}),
        "parallel-norms": (
            "ParBnConfig",
            {
                "ln_before": True,
                "ln_after": True,
                "scaling": "learned",
                "original_ln_before": True,  # parallel bottlenecks do not ask for it, nor for the next two
                "residual_before_ln": False,
                "adapter_residual_before_ln": True,
            },
        ),
    },
    "mistral": COMMON,
    "gpt2": COMMON,
}


class TieError(Exception):
    """Two tokens are as good as each other."""


def base_digest(model: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def answers(model: Any) -> Iterator[dict[str, Any]]:
    """Logits after each prompt, and the greedy tokens."""
    for text in PROMPTS:
        prompt = list(text.encode())
        tokens, steps = list(prompt), []
        for _ in range(NUM_TOKENS):
            steps.append(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1])
            tokens.append(int(steps[-1].argmax()))
        best = torch.stack(steps).topk(2).values
        if (best[:, 0] - best[:, 1]).min() < LEAST_MARGIN:
            raise TieError
        yield {
            "prompt": prompt,
            "logits": [round(value, 5) for value in steps[0].tolist()],
            "tokens": tokens[len(prompt) :],
        }


def randomise(model: Any, seed: int) -> None:
    """Fill the adapter's parameters from the seed: matrices anew, vectors moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".adapters.{NAME}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                is_matrix = parameter.dim() > 1
                parameter.copy_(2 * noise / parameter.shape[-1] ** 0.5 if is_matrix else parameter + 0.3 * noise)


def save(model: Any, folder: Path) -> None:
    """As users do; where a norm has two names, `adapters` can only write a pickle, of which safetensors are made."""
    try:
        model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=True)
    except RuntimeError:
        model.save_adapter(str(folder), NAME, with_head=False)
        pickle = folder / "pytorch_adapter.bin"
        tensors: dict[str, Tensor] = torch.load(pickle, weights_only=True)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
        pickle.unlink()


def make(base: Path, folder: Path, seed: int, case: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write one artifact; its answers."""
    import adapters

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters.init(model)
    config_class, changes = case
    model.add_adapter(NAME, config=getattr(adapters, config_class)(**changes), set_active=True)
    model.eval()
    made = _without_ties(model, seed)
    save(model, folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "tiny"))  # a scratch folder's name is no one's business
    return made


def _without_ties(model: Any, seed: int) -> list[dict[str, Any]]:
    """Fill the adapter from the first seed whose answers have no ties; these answers."""
    for trial in range(seed, seed + 100):
        randomise(model, trial)
        with suppress(TieError):
            return list(answers(model))
    raise TieError


def main() -> None:
    """Write everything anew."""
    shutil.rmtree(HERE, ignore_errors=True)
    golden: dict[str, Any] = {}
    for model_type, cases in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            base = make_tiny_base(Path(scratch) / "base", model_type)
            stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            made: dict[str, Any] = {"base": list(answers(stock))}
            for seed, (name, case) in enumerate(cases.items()):
                folder = HERE / model_type / name
                folder.mkdir(parents=True)
                made[name] = make(base, folder, 100 * seed, case)
            golden[model_type] = {"base_sha256": base_digest(stock), "answers": made}
    ANSWERS.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
