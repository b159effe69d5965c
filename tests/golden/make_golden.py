"""Make the golden answers: `python -m tests.golden.make_golden tiny|real|families`.

The oracle is Hugging Face transformers and PEFT alone: fp32, one prompt at a time, greedy `generate`; for what PEFT
does not have, the stock model with other parameters (selective) or with plain modules around its own (bottleneck).
About 15 minutes of two cores for `real` and for `families`, seconds for `tiny`. The files are committed, so that CI
need not run this.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel, PeftType
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.golden import cases
from tests.golden.compare import NUM_LOGITS, Adapter, Answer, Golden, sketch
from tests.kit.adapters import tensors_digest
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED, bottleneck, selective
from tests.kit.tiny import make_tiny_base

PACKAGES = ("torch", "transformers", "peft")


def load(folder: Path) -> Any:
    """The stock model in fp32, told to ignore end tokens."""
    return finalize(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def finalize(model: Any) -> Any:
    """A model that answers to the last token that is asked for."""
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def answer(model: Any, prompt: list[int], num_tokens: int) -> Answer:
    """Greedy `generate` of one prompt."""
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.MULTITASK_PROMPT_TUNING:
        return _answer_by_forwards(model, prompt, num_tokens)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return _as_answer(out.sequences[0, -num_tokens:].tolist(), torch.cat(out.logits))


def _answer_by_forwards(model: Any, prompt: list[int], num_tokens: int) -> Answer:
    """The same, a forward of everything a token: `generate` passes no task ids on."""
    tokens, logits = list(prompt), []
    for _ in range(num_tokens):
        logits.append(model(torch.tensor([tokens]), task_ids=torch.tensor([0])).logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
    return _as_answer(tokens[len(prompt) :], torch.stack(logits))


def _as_answer(tokens: list[int], logits: torch.Tensor) -> Answer:
    best = logits.topk(2).values
    first = logits[0].topk(NUM_LOGITS)
    return Answer(
        tokens,
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
            model = load(base) if folder is None else oracle(base, folder, adapters[name].get("family", ""))
            answers[name] = [answer(model, prompt, num_tokens) for prompt in track(prompts, name)]
        made = {name: Adapter(adapters[name], sketch(folder)) for name, folder in folders.items()}
    made_with = {package: version(package) for package in PACKAGES}
    return Golden(made_with, tensors_digest(base), strength, prompts, made, answers)


def oracle(base: Path, folder: Path, family: str) -> Any:
    """What an artifact's own library makes of it."""
    if family.startswith("bottleneck"):
        return finalize(bottleneck.adapted(base, folder))
    if family.startswith(("selective", "bitfit")):
        return finalize(selective.trained(base, folder))
    return PeftModel.from_pretrained(load(base), folder).eval()


def make_families() -> dict[str, Golden]:
    """Three artifacts of every method or more: on a tiny llama, a tiny qwen2 (which has biases), and the real base."""
    from adapters_store.base.resolve import resolve_base

    golden, all_families = {}, cases.family_adapters(FAMILIES)
    biased = cases.family_adapters([*FAMILIES_OF_BIASED, "lora-bias", "lora-saved", "dora"])
    for model_type, adapters in {"llama": all_families, "qwen2": biased}.items():
        with tempfile.TemporaryDirectory() as scratch:
            base = make_tiny_base(Path(scratch), model_type)
            golden[model_type] = make(base, adapters, 0.0, cases.tiny_prompts(), cases.FAMILY_TOKENS)
    base, real = resolve_base("smollm2-135m"), cases.family_adapters(FAMILIES, is_real=True)
    golden["smollm2-135m"] = make(base, real, 0.0, cases.short_prompts(), cases.FAMILY_TOKENS)
    return golden


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
    from adapters_store.base.resolve import resolve_base

    texts = cases.real_prompts()[:num_prompts]
    base = resolve_base("smollm2-135m")
    return {"smollm2-135m": make(base, cases.REAL_ADAPTERS, cases.REAL_STRENGTH, texts, cases.REAL_TOKENS)}


def main() -> None:
    """Write golden_<which>.json beside this file, or to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["tiny", "real", "families"])
    parser.add_argument("--num-prompts", type=int, help="real only: the first few prompts")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
    makers: dict[str, Callable[[], dict[str, Golden]]] = {
        "tiny": make_tiny,
        "families": make_families,
        "real": lambda: make_real(arguments.num_prompts),
    }
    golden = makers[arguments.which]()
    out = arguments.out or cases.HERE / f"golden_{arguments.which}.json"
    out.write_bytes(msgspec.json.encode(golden) + b"\n")


if __name__ == "__main__":
    main()
