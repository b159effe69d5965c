"""Target modules and layers: `--target-modules` and `--layers` in the form of PEFT's configs."""

from __future__ import annotations

import re
from typing import Any

from training.base import Base
from training.errors import OptionError

ALL_LINEAR = "all-linear"


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Return the layers that `all`, `last:N` or `0,4-7` name, in order. Raises `OptionError`."""
    if text == "all":
        return list(range(num_layers))
    if match := re.fullmatch(r"last:(\d+)", text):
        return list(range(max(0, num_layers - int(match[1])), num_layers))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise OptionError(f"--layers {text!r}: write all, last:N, or numbers and ranges like 0,4-7.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not layers or max(layers) >= num_layers:
        raise OptionError(f"--layers {text!r}: the base has {num_layers} layers, 0 to {num_layers - 1}.")
    return sorted(layers)


def names(text: str) -> list[str]:
    """Return the names in a list joined by commas, sorted. Raises `OptionError` if there is none."""
    unique = sorted({name.strip() for name in text.split(",") if name.strip()})
    if not unique:
        raise OptionError("--target-modules names no module: write all-linear, or names like q_proj,v_proj.")
    return unique


def linear_names(text: str, base: Base) -> list[str]:
    """Return the last words of linears' names; `all-linear` is written out, as PEFT takes no layers beside it.

    Raises `OptionError` for a name that is no module's.
    """
    wanted, linears = (
        names(text),
        sorted({site.rpartition(".")[2] for site in base.spec.linears if site != base.spec.head}),
    )
    if wanted == [ALL_LINEAR]:
        return linears
    modules = [module for module, _ in base.model.named_modules()]
    if unknown := next((name for name in wanted if not any(ends_with(module, name) for module in modules)), None):
        has = ", ".join(linears)
        raise OptionError(f"--target-modules names {unknown!r}, which no module of {base.name} is: it has {has}.")
    return wanted


def ends_with(module: str, name: str) -> bool:
    """Whether a module's whole name ends with these words, as PEFT matches `target_modules`."""
    return f".{module}".endswith(f".{name}")


def where(target_modules: str, layers: str, base: Base) -> dict[str, Any]:
    """Return `target_modules` and `layers_to_transform` of a PEFT config that has both. Raises `OptionError`."""
    chosen = parse_layers(layers, base.spec.num_layers)
    is_all = len(chosen) == base.spec.num_layers
    return {"target_modules": linear_names(target_modules, base), "layers_to_transform": None if is_all else chosen}


def sites_in(layers: str, sites: list[str], base: Base) -> list[str]:
    """Return the sites that lie in the chosen layers; `all` keeps those in no layer too. Raises `OptionError`."""
    if layers == "all":
        return sites
    starts = [f"{base.spec.layers[number].layer}." for number in parse_layers(layers, base.spec.num_layers)]
    return [site for site in sites if any(site.startswith(start) for start in starts)]


def linear_sites(target_modules: str, layers: str, base: Base) -> list[str]:
    """Return whole names of linears, for PEFT's configs without layers. Raises `OptionError` if there is none."""
    wanted = linear_names(target_modules, base)
    sites = [site for site in base.spec.linears if any(ends_with(site, name) for name in wanted)]
    chosen = sites_in(layers, sites, base)
    if not chosen:
        raise OptionError(f"--target-modules {target_modules!r} with --layers {layers!r} names no linear of the base.")
    return chosen
