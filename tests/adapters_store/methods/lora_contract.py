"""The laws of a LoRA, with all that PEFT trains or saves beside low-rank updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig

from adapters_store.methods.lora import IGNORED_KEYS, SERVED_VALUES, LoraConfig
from tests.adapters_store.methods.method_contract import LinearContract
from tests.kit.families import loras


class LoraContract(LinearContract):
    """LoRA of every kind; a subclass for each states its cases."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "LORA", "LoRA", PeftLoraConfig, LoraConfig
    IGNORED_KEYS, SERVED_VALUES = IGNORED_KEYS, SERVED_VALUES

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one on every linear, if the config does not say others."""
        return loras.make(folder, base, loras.config(**config), seed)
