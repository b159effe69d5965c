"""Read the tensors of an untrusted safetensors file: names, dtypes, layout and values are checked."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.safetensors_header import read_header

MAX_DIMENSIONS = 8
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file in its own dtype, each a private, aligned copy with finite values only.

    Raises `ArtifactError` naming the tensor that is refused.
    """
    header, _metadata, start = read_header(data)
    spans = {name: _entry(name, entry) for name, entry in header.items()}
    _check_layout(spans, len(data) - start)
    body = memoryview(data)[start:]
    return {name: _tensor(name, entry, body[slice(*spans[name])]) for name, entry in header.items()}


def _entry(name: str, entry: Any) -> tuple[int, int]:
    """Check an entry of the header, and return its (begin, end) in the tensors' bytes."""
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise ArtifactError(f"the tensor name {name[:100]!r} is not a dotted name", name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"the header's entry of {name} is not dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise MethodUnsupportedError(
            f"{name} has dtype {str(dtype)[:20]}; taken are {', '.join(SAFETENSORS_DTYPES)}", name
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{name} has a shape or offsets that are not counts", name)
    num_bytes = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ArtifactError(f"{name} of shape {shape} needs {num_bytes} bytes, its offsets span another number", name)
    return offsets[0], offsets[1]


def _are_counts(things: Any) -> bool:
    return isinstance(things, list) and all(type(thing) is int and 0 <= thing < 2**48 for thing in things)


def _check_layout(spans: dict[str, tuple[int, int]], size: int) -> None:
    end = 0
    for name, (begin, until) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise ArtifactError(f"the bytes of {name} overlap another tensor's, or leave a hole", name)
        end = until
    if end != size:
        raise ArtifactError(f"the tensors take {end} bytes, the file has {size}")


def _tensor(name: str, entry: dict[str, Any], span: memoryview) -> Tensor:
    if not span:  # AdaLoRA writes tensors of rank 0
        return torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])
    tensor = torch.frombuffer(bytearray(span), dtype=SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])
    if not is_finite(tensor):
        raise ArtifactError(f"{name} holds a value that is not finite (NaN or infinity)", name)
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Tell if a tensor has no NaN and no infinity: its least or greatest value would be one."""
    return not tensor.numel() or all(math.isfinite(end.item()) for end in torch.aminmax(tensor))
