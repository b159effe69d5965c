"""Read the header of a safetensors file: strictly from an upload, plainly from a file that is trusted. Needs no torch.

The library (0.8) accepts duplicate names, spaces before the header, sizes of 2^62 and headers of any length: an
uploaded header is therefore checked whole, before a tensor is built from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters_store.errors import ArtifactError, ArtifactTooLargeError
from adapters_store.format.strict_json import StrictJSONError, loads

MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 4096
METADATA = "__metadata__"


def read_header(data: bytes) -> tuple[dict[str, Any], dict[str, str], int]:
    """Parse and check the header of an untrusted file from its first bytes.

    Returns the entries by tensor name, the metadata, and the offset of the tensors' bytes. Raises `ArtifactError`.
    """
    if len(data) < 8:
        raise ArtifactError("the safetensors file is shorter than its 8-byte length field")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise ArtifactTooLargeError(f"the safetensors header has {size} bytes; at most {MAX_HEADER_BYTES} are taken")
    if size > len(data) - 8:
        raise ArtifactError(f"the safetensors header should have {size} bytes, but the file ends before that")
    if data[8:9] != b"{":
        raise ArtifactError("the safetensors header does not begin with '{'")
    try:
        header = loads(data[8 : 8 + size])
    except StrictJSONError as error:
        raise ArtifactError(f"the safetensors header is not sound JSON: {error}") from None
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError("the safetensors metadata is not a map of texts", METADATA)
    if len(header) > MAX_TENSORS:
        raise ArtifactTooLargeError(f"the file has {len(header)} tensors; at most {MAX_TENSORS} are taken")
    return header, metadata, 8 + size


def trusted_entries(file: Path) -> dict[str, dict[str, Any]]:
    """Read the entries {"dtype", "shape", "data_offsets"} of a trusted file, such as a base's weights, by tensor name.

    Nothing is checked and no size is bounded: a base's header can be larger than what an upload may have.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    header.pop(METADATA, None)
    return header
