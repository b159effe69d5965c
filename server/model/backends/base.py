"""The protocol of a compute backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Product = Callable[[Tensor], Tensor]  # x [..., in] -> y [..., out], the bias added
Packer = Callable[[Tensor, Tensor | None], Product]  # weight [out, in], bias [out] -> Product


# The kinds of primitives, in the order in which they act.
SCALE_IN, SCALE_OUT, DELTA, ROWS, PROJECTION, BIAS = KINDS = range(6)
