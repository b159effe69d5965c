"""Recompute what PiSSA and OLoRA subtract from the base's weight when PEFT initialises them, on load as in training.

PiSSA (arXiv:2404.02948) subtracts the r greatest singular components of W, OLoRA (arXiv:2406.01775) s times the
projection of W on its first r columns. Neither depends on a sign or seed, so both can be recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.methods.shared.low_rank import linear_weight

HOW_TO_CONVERT = "save with path_initial_model_for_weight_conversion to get a plain LoRA"
MAX_WORK = 1e10  # sum of the cubed smaller sides of PiSSA's SVDs: about 5 s on an idle core, at each load


def check_init_residual(spec: BaseSpec, sites: Iterable[str], init: str) -> None:
    """Raise `MethodUnsupportedError` if this would take too long, or PEFT computes something else."""
    linears = [spec.linears[site] for site in sites]
    if init == "olora" and any(linear.is_transposed for linear in linears):
        raise MethodUnsupportedError(f"olora on Conv1D is not served: {HOW_TO_CONVERT}", "init_lora_weights")
    if init == "pissa" and sum(min(linear.in_features, linear.out_features) ** 3 for linear in linears) > MAX_WORK:
        raise MethodUnsupportedError(
            f"pissa on so many or so wide layers takes too long to convert here: {HOW_TO_CONVERT}", "init_lora_weights"
        )


def init_residual(spec: BaseSpec, site: str, init: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] whose product PEFT subtracts from the weight. Raises `ArtifactError`."""
    weight = linear_weight(spec, site)
    if rank > min(weight.shape):
        raise ArtifactError(f"{init} of rank {rank} is impossible at {site}, of {min(weight.shape)} dimensions", "r")
    if init == "olora":
        exact = weight.double()
        q = torch.linalg.qr(exact[:, :rank]).Q
        return (q.T @ exact).float(), (scale * q).float()
    if scale < 0:
        raise ArtifactError("pissa with a negative lora_alpha is not a number", "lora_alpha")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # PEFT's routine, with the same rounding
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
