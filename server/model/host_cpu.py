"""Ask this machine's CPU for its features; imports no torch, so that it is quick."""

from __future__ import annotations

import platform

import llvmlite.binding


def features() -> dict[str, bool]:
    """The features of this CPU by LLVM's names (avx2, f16c, …); empty if LLVM does not know them."""
    return dict(llvmlite.binding.get_host_cpu_features())


def has_halves() -> bool:
    """Tell whether this CPU widens 16-bit floats by itself."""
    return platform.machine() in ("aarch64", "arm64") or bool(features().get("f16c"))
