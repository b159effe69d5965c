"""CPU kernels (Numba): products that no neighbour changes, paged attention, adapters; and the backend of them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numba

from adapters_store.base.resolve import default_cache
from server.model.backends import codes


def _share_compiled(folder: Path) -> None:
    """Keep what Numba compiles under the digest of the kernels' sources.

    Its own cache looks at one file at a time, and would go on with what an older neighbour of that file had inlined.
    If nothing can be written, Numba looks for a place of its own.
    """
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(codes.__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    target = folder / "kernels" / digest.hexdigest()[:16]
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True)
        numba.config.CACHE_DIR = str(target)


_share_compiled(default_cache())
