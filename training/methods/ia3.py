"""(IA)3 (arXiv:2205.05638) as PEFT trains it: a factor for each output of keys and values, and feed-forward input."""

from __future__ import annotations

from collections.abc import Sequence

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.targets import ends_with, linear_sites, names
from training.methods.trainable import PeftAdapter, attach_peft
from training.options import IA3Options

# The names of the linears that (IA)3 scales, in the families of bases that are served: outputs, and inputs.
OUTPUTS = ("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value")
INPUTS = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")


def ia3(options: IA3Options, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Attach (IA)3 through PEFT. Raises `OptionError`."""
    from peft import IA3Config

    inputs = options.feedforward_modules or _present(INPUTS, base)
    sites_in = set(linear_sites(inputs, options.layers, base))
    wanted = options.target_modules or f"{_present(OUTPUTS, base)},{inputs}"
    sites = linear_sites(wanted, options.layers, base)
    if options.feedforward_modules and (lost := sites_in.difference(sites)):
        raise OptionError(f"--feedforward-modules names {min(lost)}, which --target-modules does not.")
    config = IA3Config(
        target_modules=sites, feedforward_modules=sorted(sites_in.intersection(sites)), task_type="CAUSAL_LM"
    )
    return PeftAdapter(attach_peft(base, config))


def _present(wanted: Sequence[str], base: Base) -> str:
    """Join those of the names that linears of the base have. Raises `OptionError` if there is none."""
    present = [name for name in wanted if any(ends_with(site, name) for site in base.spec.linears)]
    if not present:
        raise OptionError("This base has none of the linears that (IA)3 scales by default: name --target-modules.")
    return ",".join(names(",".join(present)))
