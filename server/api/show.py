"""What users are told of a version, wherever it is shown."""

from __future__ import annotations

from typing import Any

from adapters_store.registry import Version
from adapters_store.spec import ItemBytes


def identity(version: Version, item_bytes: ItemBytes | None) -> dict[str, Any]:
    """Which version it is, and what it takes: of its files, of the device (None: not known yet), and of a sequence."""
    return {
        "version": version.number,
        "digest": version.digest,
        "method": version.method,
        "num_parameters": version.num_parameters,
        "bytes": version.num_bytes,
        "slot_bytes": None if item_bytes is None else item_bytes.of(version),
        "virtual_tokens": version.num_virtual,
    }
