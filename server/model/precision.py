"""Precisions: the names of dtypes, and in which dtype weights and slots are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters_store.base.spec import ItemBytes
from server.model.host_cpu import has_halves as has_halves

DTYPE_OF_PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """Return the dtype of activations: on CPU always fp32, whatever the weights are packed to."""
    return torch.float32 if torch.device(device).type == "cpu" else DTYPE_OF_PRECISION[precision]


def choose_storage_dtypes(precision: str, device: str) -> StorageDtypes:
    """Return the dtypes of slots and KV cache: matrices and KV in fp16 on a CPU with F16C unless it is fp32."""
    is_halved = torch.device(device).type == "cpu" and precision != "fp32" and has_halves()
    dtype = compute_dtype(precision, device)
    return StorageDtypes(torch.float16 if is_halved else dtype, dtype)


@dataclass(frozen=True)
class StorageDtypes:
    """The types that a slot keeps matrices and everything else in; what is read of it is of the latter.

    The KV cache is kept as matrices are.
    """

    matrices: torch.dtype
    others: torch.dtype

    @property
    def item_bytes(self) -> ItemBytes:
        """Bytes of a number of each sort."""
        return ItemBytes(self.matrices.itemsize, self.others.itemsize)
