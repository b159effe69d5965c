"""What the CPU computes itself because no library has it: products that no neighbour changes, paged attention, hats.

Rooms above call these where `supports` says so, and the slow twins in plain torch elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numba
import torch

from adapters_store.base.resolve import default_cache


def _share_compiled(folder: Path) -> None:
    """Keep what Numba compiles under the digest of this room's sources.

    Its own cache looks at one file at a time, and would go on with what an older neighbour of that file had inlined.
    Where nothing can be written, Numba looks for a place of its own.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    target = folder / "kernels" / digest.hexdigest()[:16]
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True)
        numba.config.CACHE_DIR = str(target)


_share_compiled(default_cache())


def supports(device: str, dtype: torch.dtype) -> bool:
    """Whether these kernels serve activations of this type on this device: the one place where that is chosen."""
    return torch.device(device).type == "cpu" and dtype == torch.float32
