"""LoRA and its nearest variants: y += s B (A x) at the linears (arXiv:2106.09685), all written as PEFT's LoRA.

rsLoRA scales by alpha / sqrt(r) (arXiv:2312.03732), DoRA trains the rows' lengths too (arXiv:2402.09353); PiSSA and
OLoRA begin with a part of the base's own weights (arXiv:2404.02948, 2406.01775).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.targets import where
from training.methods.trainable import ADAPTER_NAME, PeftAdapter, attach_peft
from training.options import FixedScaleOptions, LoraOptions

A_END, B_END = ".lora_A.weight", ".lora_B.weight"


def lora(
    options: LoraOptions | FixedScaleOptions, base: Base, _rows: Sequence[TokenizedRow], **more: Any
) -> PeftAdapter:
    """Attach a LoRA; `more` are keys of PEFT's LoraConfig. Raises `OptionError`."""
    return PeftAdapter(attach_peft(base, lora_config(options, base, **more)))


def lora_config(options: LoraOptions | FixedScaleOptions, base: Base, **more: Any) -> Any:
    """Return PEFT's LoraConfig of the options. Raises `OptionError`."""
    from peft import LoraConfig

    check_rank(options.r)
    return LoraConfig(
        r=options.r,
        lora_alpha=int_if_whole(options.alpha),
        lora_dropout=options.dropout,
        task_type="CAUSAL_LM",
        **where(options.target_modules, options.layers, base),
        **{"use_rslora": getattr(options, "use_rslora", False), **more},
    )


def check_rank(rank: int) -> None:
    """Raise `OptionError` for a rank below 1."""
    if rank < 1:
        raise OptionError(f"--r must be at least 1, not {rank}.")


def int_if_whole(number: float) -> float:
    """Return a number as PEFT's own configs have it: an int if it is whole."""
    return int(number) if number == int(number) else number


class ResidualLoraAdapter(PeftAdapter):
    """PiSSA or OLoRA, whose initialisation took s B0 A0 off the base's weights.

    It is written as the plain LoRA [A; A0], [B, -B0] of twice the rank, which fits the base as it is.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._begun = {name: tensor.clone() for name, tensor in super().tensors().items()}

    @torch.no_grad()
    def finalize(self, dtype: torch.dtype) -> None:
        """Round A, B, A0 and B0, and give the base's weights what rounding took off B0 A0."""
        for name in [name for name in self._begun if name.endswith(A_END)]:
            site = name.removesuffix(A_END)
            layer = self.model.get_submodule(site)
            before = self._product(site)
            for end in (A_END, B_END):
                self._begun[site + end] = self._begun[site + end].to(dtype).float()
            layer.get_base_layer().weight += layer.scaling[ADAPTER_NAME] * (before - self._product(site))
        for parameter in self.trained():
            parameter.copy_(parameter.to(dtype).float())

    def _product(self, site: str) -> Tensor:
        return self._begun[site + B_END] @ self._begun[site + A_END]

    def config(self) -> dict[str, Any]:
        """Return the config of the plain LoRA: twice the rank at the same scale."""
        config = super().config()
        factor = math.sqrt(2) if config["use_rslora"] else 2
        return {
            **config,
            "r": 2 * config["r"],
            "lora_alpha": factor * config["lora_alpha"],
            "init_lora_weights": True,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return [A; A0] and [B, -B0] of every linear."""
        return {
            name: torch.cat([tensor, self._begun[name]])
            if name.endswith(A_END)
            else torch.cat([tensor, -self._begun[name]], dim=1)
            for name, tensor in super().tensors().items()
        }


def residual_lora(
    options: FixedScaleOptions, base: Base, _rows: Sequence[TokenizedRow], init: str
) -> ResidualLoraAdapter:
    """Attach a LoRA that begins with a part of the weights; `init` is PEFT's name of the initialisation."""
    return ResidualLoraAdapter(attach_peft(base, lora_config(options, base, init_lora_weights=init)))
