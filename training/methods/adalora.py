"""AdaLoRA (arXiv:2303.10512): LoRA by singular values, which moves ranks to the sites that need them as it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.lora import check_rank, int_if_whole
from training.methods.targets import where
from training.methods.trainable import PeftAdapter, attach_peft
from training.options import AdaLoraOptions

WARM, FINAL = 0.1, 0.3  # shares of the run at the beginning and at the end in which no rank is dropped
MEMORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's statistics of each value's importance


def adalora(options: AdaLoraOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach AdaLoRA through PEFT. Raises `OptionError`."""
    from peft import AdaLoraConfig

    check_rank(options.init_r)
    check_rank(options.target_r)
    config = AdaLoraConfig(
        init_r=options.init_r,
        target_r=options.target_r,
        lora_alpha=int_if_whole(options.alpha),
        lora_dropout=options.dropout,
        total_step=1,  # until the plan is known
        task_type="CAUSAL_LM",
        **where(options.target_modules, options.layers, base),
    )
    return AdaLoraAdapter(attach_peft(base, config))


class AdaLoraAdapter(PeftAdapter):
    """AdaLoRA, whose ranks fall with the steps: it must know how many there are."""

    def begin(self, num_steps: int | None) -> None:
        """Set PEFT's schedule of ranks. Raises `OptionError` if time alone bounds the run."""
        if num_steps is None:
            raise OptionError("--method adalora plans its ranks by steps: give --steps or --epochs, not time alone.")
        config = self.peft_config
        config.total_step = num_steps
        config.tinit, config.tfinal = int(WARM * num_steps), max(1, int(FINAL * num_steps))
        config.deltaT = max(1, num_steps // 100)

    def penalty(self) -> Tensor:
        """Return the mean of |A A^T - I| and |B^T B - I|, as PEFT weighs it: the distance from orthogonal factors."""
        norms = []
        for name, p in self.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = p @ p.T if "lora_A" in name else p.T @ p
                norms.append(torch.norm(square - torch.eye(len(square), device=p.device)))
        penalty: Tensor = self.peft_config.orth_reg_weight * torch.stack(norms).mean()
        return penalty

    def after_step(self, number: int) -> None:
        """Let PEFT weigh the singular values, and drop the least."""
        self.model.base_model.update_and_allocate(number)

    def state(self) -> dict[str, Any]:
        """Return the importance of the singular values, and which of them are kept."""
        allocator = self.model.base_model.rankallocator
        return {"pattern": self.peft_config.rank_pattern, **{name: dict(getattr(allocator, name)) for name in MEMORY}}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.peft_config.rank_pattern = state["pattern"]
        for name in MEMORY:
            setattr(self.model.base_model.rankallocator, name, state[name])

    @torch.no_grad()
    def finalize(self, dtype: torch.dtype) -> None:
        """Zero the singular values that were not kept, and round."""
        if self.peft_config.rank_pattern:
            allocator = self.model.base_model.rankallocator
            allocator.mask_using_rank_pattern(self.model.base_model.model, self.peft_config.rank_pattern)
        super().finalize(dtype)
