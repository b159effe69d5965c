"""Find the primitives of a patch that change nothing, by their effect: an adapter saved before it was trained has some.

A LoRA whose B is zero is wired as it should be, and answers as the base. Where an update is a difference (PiSSA, OLoRA:
the factors less those of the initialisation; DoRA: a quotient of norms), what is left of it by rounding is nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adapters_store.methods.shared.low_rank import MIN_ROUNDING
from adapters_store.primitives import Bias, Bottleneck, Delta, LowRank, Patch, Rows, Scale

SitePrimitive = LowRank | Scale | Bias | Bottleneck | Delta | Rows  # virtual tokens always change something
NUM_ROWS = 16  # of random inputs: a relu that is shut for all of them is shut


@torch.no_grad()
def idle_primitives(
    patch: Patch, item_dtype: torch.dtype = torch.float32, file_dtype: torch.dtype = torch.float32
) -> list[SitePrimitive]:
    """Return the primitives that leave every input as it is, once their matrices are rounded to `item_dtype`.

    `file_dtype` is the coarsest in which the artifact's tensors were written.
    """
    at_sites = [primitive for primitive in patch.primitives if isinstance(primitive, SitePrimitive)]
    return [primitive for primitive in at_sites if not _changes_something(primitive, item_dtype, file_dtype)]


def _changes_something(primitive: SitePrimitive, dtype: torch.dtype, file_dtype: torch.dtype) -> bool:
    """Tell if a primitive changes any of some random inputs."""
    match primitive:
        case Scale(v=v):
            return bool(((v - 1).abs() >= max(MIN_ROUNDING, torch.finfo(file_dtype).eps / 2)).any())
        case Bias(b=b):
            return bool(b.any())
        case Delta(dw=matrix) | Rows(de=matrix):
            return bool(_rounded(matrix, dtype).any())
        case LowRank():
            rounded = replace(primitive, a=_rounded(primitive.a, dtype), b=_rounded(primitive.b, dtype))
            rounding = MIN_ROUNDING + torch.finfo(dtype).eps + torch.finfo(file_dtype).eps
            return _exceeds_rounding(rounded, rounding)
        case Bottleneck():
            down, up = _rounded(primitive.down, dtype), _rounded(primitive.up, dtype)
            return bool(replace(primitive, down=down, up=up).update(_inputs(primitive.down)).any())


def _exceeds_rounding(primitive: LowRank, rounding: float) -> bool:
    """Tell if any output is more than the rounding of its terms, which may cancel one another out.

    The terms' size is that of a sum in which none cancels any.
    """
    a, b, x = primitive.a.double(), primitive.b.double(), _inputs(primitive.a)[:NUM_ROWS].double()
    squares = replace(primitive, a=a, b=b).update(x).square().mean(dim=0)
    terms = replace(primitive, a=a.square(), b=b.square()).update(x.square()).mean(dim=0)
    return not bool((squares <= rounding**2 * terms).all())


def _rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype).float()


def _inputs(matrix: Tensor) -> Tensor:
    """Return random rows [48, in] of three sizes for a matrix [r, in]."""
    rows = torch.randn(NUM_ROWS, matrix.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, 1e2 * rows, 1e4 * rows])  # residual streams reach hundreds: a bias may shut smaller ones
