"""Make the golden answers: `python -m tests.golden.make_golden tiny|real`.

The oracle is Hugging Face transformers and PEFT alone: fp32, one prompt at a time, greedy `generate`. About 15
minutes of two cores for `real`, seconds for `tiny`. The files are committed, so that CI need not run this.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.golden import cases
from tests.golden.compare import NUM_LOGITS, Adapter, Answer, Golden
from tests.kit.adapters import tensors_digest
from tests.kit.tiny import make_tiny_base

PACKAGES = ("torch", "transformers", "peft")


def load(folder: Path) -> Any:
    """The stock model in fp32, told to ignore end tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def answer(model: Any, prompt: list[int], num_tokens: int) -> Answer:
    """Greedy `generate` of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    best = logits.topk(2).values
    first = logits[0].topk(NUM_LOGITS)
    return Answer(
        out.sequences[0, len(prompt) :].tolist(),
        [round(margin, 5) for margin in (best[:, 0] - best[:, 1]).tolist()],
        first.indices.tolist(),
        [round(value, 5) for value in first.values.tolist()],
    )


def make(base: Path, adapters: dict[str, Any], strength: float, texts: list[str], num_tokens: int) -> Golden:
    """Every prompt with the base and with every adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text).input_ids for text in texts]
    with tempfile.TemporaryDirectory() as scratch:
        folders = cases.make_adapters(Path(scratch), base, adapters, strength)
        answers = {}
        for name, folder in {"base": None, **folders}.items():
            model = load(base) if folder is None else PeftModel.from_pretrained(load(base), folder).eval()
            answers[name] = [answer(model, prompt, num_tokens) for prompt in track(prompts, name)]
        made = {name: Adapter(adapters[name], tensors_digest(folder)) for name, folder in folders.items()}
    made_with = {package: version(package) for package in PACKAGES}
    return Golden(made_with, tensors_digest(base), strength, prompts, made, answers)


def make_tiny() -> dict[str, Golden]:
    """All tiny types."""
    golden = {}
    for model_type in cases.TINY_TYPES:
        with tempfile.TemporaryDirectory() as scratch:
            base = make_tiny_base(Path(scratch), model_type)
            adapters = cases.tiny_adapters(model_type)
            golden[model_type] = make(base, adapters, cases.TINY_STRENGTH, cases.tiny_prompts(), cases.TINY_TOKENS)
    return golden


def make_real(num_prompts: int | None) -> dict[str, Golden]:
    """The real base; `num_prompts` cuts it short for a look."""
    from adapters_store.bases import resolve_base

    texts = cases.real_prompts()[:num_prompts]
    base = resolve_base("smollm2-135m")
    return {"smollm2-135m": make(base, cases.REAL_ADAPTERS, cases.REAL_STRENGTH, texts, cases.REAL_TOKENS)}


def main() -> None:
    """Write golden_<which>.json beside this file, or to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["tiny", "real"])
    parser.add_argument("--num-prompts", type=int, help="real only: the first few prompts")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
    golden = make_tiny() if arguments.which == "tiny" else make_real(arguments.num_prompts)
    out = arguments.out or cases.HERE / f"golden_{arguments.which}.json"
    out.write_bytes(msgspec.json.encode(golden) + b"\n")


if __name__ == "__main__":
    main()
