"""Selective methods: some of the base's own parameters are trained, the rest is frozen.

Biases (BitFit, arXiv:2106.10199), chosen layers or modules, or all (`full`, for comparison) are written as our own
SELECTIVE folder; norms (arXiv:2312.11420), rows of the embedding and biases that a base lacks go through PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.methods.shared.expect import PREFIX
from adapters_store.methods.shared.full_modules import parameters as parameters_at
from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.targets import linear_sites, sites_in
from training.methods.trainable import PeftAdapter, TrainableAdapter, attach_peft
from training.options import SEEN, BiasOptions, LayerOptions, MethodOptions, SelectiveOptions, TokenOptions


class SelectiveAdapter(TrainableAdapter):
    """The base itself, with some of its parameters trainable."""

    def __init__(self, base: Base, names: Sequence[str]) -> None:
        super().__init__(base.model)
        self._base_name, self._names = base.name, sorted(names)
        for name in self._names:
            base.model.get_parameter(name).requires_grad_(True)

    def config(self) -> dict[str, Any]:
        """Every trained parameter by its whole name."""
        return {
            "base_model_name_or_path": self._base_name,
            "parameters": self._names,
            "peft_type": "SELECTIVE",
            "task_type": "CAUSAL_LM",
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the new values of the trained parameters."""
        return {PREFIX + name: self.model.get_parameter(name).detach() for name in self._names}


def selective(options: SelectiveOptions, base: Base, _rows: Sequence[TokenizedRow]) -> SelectiveAdapter:
    """Train chosen layers, modules or parameters in full. Raises `OptionError`."""
    runs = [run.strip() for run in options.parameters.split(",") if run.strip()]
    names = _parameters(base.spec)
    for run in runs:
        if not any(_has(name, run) for name in names):
            raise OptionError(f"--parameters names {run!r}, which no parameter of {base.name} has in its name.")
    chosen = [name for name in names if not runs or any(_has(name, run) for run in runs)]
    return SelectiveAdapter(base, _some(sites_in(options.layers, chosen, base), options.layers))


def bitfit(options: LayerOptions, base: Base, rows: Sequence[TokenizedRow]) -> TrainableAdapter:
    """Train all biases; if the base has none, as llamas, give every linear one, as BEFT does."""
    biases = [name for name in _parameters(base.spec) if name.endswith(".bias")]
    if not biases:
        return beft(BiasOptions(layers=options.layers), base, rows)
    return SelectiveAdapter(base, _some(sites_in(options.layers, biases, base), options.layers))


def full(_options: MethodOptions, base: Base, _rows: Sequence[TokenizedRow]) -> SelectiveAdapter:
    """Train every parameter of the base."""
    return SelectiveAdapter(base, [name for name, _ in base.model.named_parameters()])


def ln_tuning(options: LayerOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Train every norm, through PEFT. Raises `OptionError`."""
    from peft import LNTuningConfig

    norms = _some(sites_in(options.layers, list(base.spec.norms), base), options.layers)
    return PeftAdapter(attach_peft(base, LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM")))


def beft(options: BiasOptions, base: Base, _rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Train a new bias of every chosen linear, through PEFT. Raises `OptionError`."""
    from peft import BeftConfig

    sites = linear_sites(options.target_modules, options.layers, base)
    return PeftAdapter(attach_peft(base, BeftConfig(target_modules=sites, task_type="CAUSAL_LM")))


def trainable_tokens(options: TokenOptions, base: Base, rows: Sequence[TokenizedRow]) -> PeftAdapter:
    """Train rows of the embedding, and of a tied head, through PEFT. Raises `OptionError`."""
    from peft import TrainableTokensConfig

    if options.token_indices == SEEN:
        ids = sorted({token for row in rows for token in row.ids})
    else:
        ids = _token_ids(options.token_indices, base.spec.vocab_size)
    config = TrainableTokensConfig(token_indices=ids, target_modules=[base.spec.embedding], task_type="CAUSAL_LM")
    return PeftAdapter(attach_peft(base, config))


def _token_ids(text: str, vocab_size: int) -> list[int]:
    ids: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if match is None:
            raise OptionError(f"--token-indices {text!r}: write {SEEN}, or ids and ranges like 5,9-12.")
        ids.update(range(int(match[1]), min(int(match[2] or match[1]), vocab_size) + 1))
    if not ids or max(ids) >= vocab_size:
        raise OptionError(f"--token-indices {text!r}: the base has the tokens 0 to {vocab_size - 1}.")
    return sorted(ids)


def _parameters(spec: BaseSpec) -> list[str]:
    """List the parameters that the server can replace; a tied head's weight is the embedding's, and listed once."""
    sites = [*spec.linears, *spec.norms, spec.embedding]
    names = [f"{site}.{name}" for site in sites for name in parameters_at(spec, site)]
    return [name for name in names if not (spec.is_tied and name == f"{spec.head}.weight")]


def _has(name: str, run: str) -> bool:
    return f".{run}." in f".{name}."


def _some(names: list[str], layers: str) -> list[str]:
    """Return the names. Raises `OptionError` if there is none."""
    if not names:
        raise OptionError(f"--layers {layers!r} leaves nothing to train.")
    return names
