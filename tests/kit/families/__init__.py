"""Random artifacts of every method that is served: `FAMILIES[name](folder, base_folder, seed)` writes one.

The same bytes for the same arguments. They change the base's answers strongly and stay finite, so that any mix-up of
adapters shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.kit.adapters import make_lora
from tests.kit.families import bottleneck, loras, prompts, relatives, selective

Maker = Callable[[Path, Path, int], Path]

FAMILIES: Mapping[str, Maker] = {
    "lora": lambda folder, base, seed: make_lora(folder, base, seed, r=2 + 3 * (seed % 4)),
    "lora-bias": loras.make_lora_bias,
    "lora-saved": loras.make_lora_saved,
    "dora": loras.make_dora,
    "adalora": loras.make_adalora,
    "bottleneck-houlsby": partial(bottleneck.make_bottleneck, placement="houlsby"),
    "bottleneck-pfeiffer": partial(bottleneck.make_bottleneck, placement="pfeiffer"),
    "bottleneck-parallel": partial(bottleneck.make_bottleneck, placement="parallel"),
    "ia3": relatives.make_ia3,
    "loha": relatives.make_loha,
    "lokr": relatives.make_lokr,
    "vera": relatives.make_vera,
    "prompt-tuning": prompts.make_prompt_tuning,
    "p-tuning": prompts.make_p_tuning,
    "multitask-prompt-tuning": prompts.make_multitask,
    "cpt": prompts.make_cpt,
    "prefix-tuning": prompts.make_prefix_tuning,
    "cartridge": prompts.make_cartridge,
    "ln-tuning": selective.make_ln_tuning,
    "trainable-tokens": selective.make_trainable_tokens,
    "selective-layer": selective.make_selective_layer,
    "beft": relatives.make_beft,
    "miss": relatives.make_miss,
    "oft": relatives.make_oft,
}
FAMILIES_OF_BIASED: Mapping[str, Maker] = {  # for bases that have biases: SmolLM2 and llama have none
    "bitfit": selective.make_bitfit,
}
