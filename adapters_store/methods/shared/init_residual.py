"""What PiSSA and OLoRA take off the base's weight when PEFT initialises them, on load as in training.

PiSSA (arXiv:2404.02948) removes the r greatest singular components of W, OLoRA (arXiv:2406.01775) s times the
projection of W on its first r columns. Neither depends on a sign or on a seed, so both can be computed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.methods.shared.low_rank import linear_weight

HOW_TO_CONVERT = "save with path_initial_model_for_weight_conversion to get a plain LoRA"
MAX_WORK = 1e10  # sum of the cubes of the narrow sides that PiSSA decomposes: some 5 s of an idle core, at each load


def check_init_residual(spec: BaseSpec, sites: Iterable[str], init: str) -> None:
    """Raise `MethodUnsupportedError` where it would take too long, or PEFT does something else."""
    linears = [spec.linears[site] for site in sites]
    if init == "olora" and any(linear.is_transposed for linear in linears):
        raise MethodUnsupportedError(f"olora on Conv1D is not served: {HOW_TO_CONVERT}", "init_lora_weights")
    if init == "pissa" and sum(min(linear.in_features, linear.out_features) ** 3 for linear in linears) > MAX_WORK:
        raise MethodUnsupportedError(
            f"pissa on so many or so wide layers takes too long to convert here: {HOW_TO_CONVERT}", "init_lora_weights"
        )


def init_residual(spec: BaseSpec, site: str, init: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product PEFT takes off the weight at a site. Raises `ArtifactError`."""
    weight = linear_weight(spec, site)
    if rank > min(weight.shape):
        raise ArtifactError(f"{init} of rank {rank} is impossible at {site}, of {min(weight.shape)} dimensions", "r")
    if init == "olora":
        exact = weight.double()
        q = torch.linalg.qr(exact[:, :rank]).Q
        return (q.T @ exact).float(), (scale * q).float()
    if scale < 0:
        raise ArtifactError("pissa with a negative lora_alpha is not a number", "lora_alpha")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # the very routine of PEFT, so that the errors are its own
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
