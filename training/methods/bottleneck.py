"""Bottleneck adapters: Houlsby (arXiv:1902.00751), Pfeiffer (arXiv:2005.00247), parallel (arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Sequence

from adapters_store.methods.bottleneck import ACTIVATION_NAMES, PLACEMENTS
from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.targets import parse_layers
from training.methods.trainable import PeftAdapter, attach_peft
from training.options import BottleneckOptions

SCALINGS = ("learned", "channel")


def bottleneck(options: BottleneckOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach bottleneck adapters through our own PEFT tuner. Raises `OptionError`."""
    from training.methods.bottleneck_layers import BottleneckTunerConfig

    _check(options)
    chosen = parse_layers(options.layers, base.spec.num_layers)
    config = BottleneckTunerConfig(
        bottleneck_size=options.bottleneck_size,
        placement=options.placement,
        non_linearity=options.non_linearity,
        scaling=_scaling(options.scaling),
        ln_before=options.ln_before,
        ln_after=options.ln_after,
        dropout=options.dropout,
        target_modules=_sites(options.placement, chosen, base),
        layers_to_transform=None if len(chosen) == base.spec.num_layers else chosen,
        task_type="CAUSAL_LM",
    )
    return PeftAdapter(attach_peft(base, config))


def _check(options: BottleneckOptions) -> None:
    if options.bottleneck_size < 1:
        raise OptionError(f"--bottleneck-size must be at least 1, not {options.bottleneck_size}.")
    if options.placement not in PLACEMENTS:
        raise OptionError(f"--placement {options.placement} is not known: take one of {', '.join(PLACEMENTS)}.")
    if options.non_linearity not in ACTIVATION_NAMES:
        names = ", ".join(ACTIVATION_NAMES)
        raise OptionError(f"--non-linearity {options.non_linearity} is not known: take one of {names}.")


def _scaling(text: str) -> float | str:
    try:
        return text if text in SCALINGS else float(text)
    except ValueError:
        raise OptionError(f"--scaling {text} is neither a number nor one of {', '.join(SCALINGS)}.") from None


def _sites(placement: str, chosen: list[int], base: Base) -> list[str]:
    """Return the modules that a placement wraps in the chosen layers. Raises `OptionError`."""
    sites = []
    for layer in (base.spec.layers[number] for number in chosen):
        if layer.mlp is None:
            raise OptionError(f"{layer.layer} of this base has no feed-forward block that is known.")
        sites += [layer.attention, layer.mlp] if placement == "houlsby" else [layer.mlp]
    return sites
