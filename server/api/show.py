"""What users are told of a version, wherever it is shown."""

from __future__ import annotations

from typing import Any

from adapters_store.registry import Version

BYTES_PER_ITEM = 4  # of a slot in fp32


def slot_bytes(num_items: int) -> int:
    """What so many numbers take on the device."""
    return num_items * BYTES_PER_ITEM


def num_items(slot_bytes: int) -> int:
    """How many numbers so many bytes of the device hold."""
    return slot_bytes // BYTES_PER_ITEM


def identity(version: Version) -> dict[str, Any]:
    """Which version it is, and what it takes: of its files, of the device, and of a sequence."""
    return {
        "version": version.number,
        "digest": version.digest,
        "method": version.method,
        "num_parameters": version.num_parameters,
        "bytes": version.num_bytes,
        "slot_bytes": slot_bytes(version.num_items),
        "virtual_tokens": version.num_virtual,
    }
