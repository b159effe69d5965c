"""Variants of LoRA, each as PEFT trains it: VeRA, LoHa, LoKr, MiSS and OFT. Their formulas are in `adapters_store`."""

from __future__ import annotations

from collections.abc import Sequence

from training.base import Base
from training.data.dataset import TokenizedRow
from training.methods.lora import check_rank, int_if_whole
from training.methods.targets import where
from training.methods.trainable import PeftAdapter, attach_peft
from training.options import LycorisOptions, MissOptions, OftOptions, VeraOptions

TASK_TYPE = "CAUSAL_LM"


def vera(options: VeraOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach VeRA: vectors around two shared random matrices (arXiv:2310.11454), which are saved with them."""
    from peft import VeraConfig

    check_rank(options.r)
    place = where(options.target_modules, options.layers, base)
    return PeftAdapter(
        attach_peft(base, VeraConfig(r=options.r, vera_dropout=options.dropout, task_type=TASK_TYPE, **place))
    )


def lycoris(options: LycorisOptions, base: Base, _rows: Sequence[TokenizedRow], kind: str) -> PeftAdapter:
    """Attach LoHa (Hadamard products, arXiv:2108.06098) or LoKr (Kronecker products, arXiv:2309.14859).

    `kind` is the name of PEFT's config.
    """
    import peft

    check_rank(options.r)
    alpha, place = int_if_whole(options.alpha), where(options.target_modules, options.layers, base)
    config = getattr(peft, kind)(r=options.r, alpha=alpha, module_dropout=options.dropout, task_type=TASK_TYPE, **place)
    return PeftAdapter(attach_peft(base, config))


def miss(options: MissOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach MiSS: a trained matrix times sums over parts of the input (arXiv:2409.15371)."""
    from peft import MissConfig

    check_rank(options.r)
    place = where(options.target_modules, options.layers, base)
    return PeftAdapter(
        attach_peft(base, MissConfig(r=options.r, miss_dropout=options.dropout, task_type=TASK_TYPE, **place))
    )


def oft(options: OftOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach OFT: rotations of the input, block by block (arXiv:2306.07280)."""
    from peft import OFTConfig

    place = where(options.target_modules, options.layers, base)
    config = OFTConfig(oft_block_size=options.block_size, module_dropout=options.dropout, task_type=TASK_TYPE, **place)
    return PeftAdapter(attach_peft(base, config))
