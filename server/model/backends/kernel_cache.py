"""Find the folder of compiled CPU kernels, and tell whether all are there; imports neither Numba nor torch.

Numba's own cache looks at one source file at a time, and would go on with what an older neighbour of that file had
inlined. So each state of the kernels' sources has a folder of its own, named by their digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from adapters_store.base.cache import default_cache, writable

HERE = Path(__file__).parent
KERNELS = (
    "adapters",
    "attention",
    "decoder",
    "layers",
    "loops",
    "product",
    "threads",
    "vector",
)  # files of `cpu` that compile
SOURCES = (*(HERE / "cpu" / f"{name}.py" for name in KERNELS), HERE / "codes.py", HERE.parent / "row_adapters.py")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class KernelCache:
    """A folder of compiled kernels; None if none can be written. `refused` is the usual one, if that cannot be."""

    folder: Path | None
    refused: Path | None = None

    def is_complete(self, precision: str) -> bool:
        """Whether all kernels for a precision were compiled here, from these sources, for this CPU."""
        return self.folder is not None and self._marker(precision).is_file()

    def mark_complete(self, precision: str) -> None:
        """Note that all kernels for a precision are compiled; a folder that cannot be written stays without a note."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                self._marker(precision).touch()

    def _marker(self, precision: str) -> Path:
        folder = self.folder or Path()
        return folder / f"complete-{precision}-{build_key()}"


def digest() -> str:
    """Sixteen hex digits of the kernels' sources, and of the codes and types that are compiled into them."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


def build_key() -> str:
    """Sixteen hex digits of what Numba asks before it takes a kernel from disk: file times, versions, the CPU."""
    stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in SOURCES]
    said = repr([stamps, version("numba"), version("llvmlite"), platform.python_version(), sorted(set(_cpu()))])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def find_cache(cache: Path | None = None) -> KernelCache:
    """The folder for these sources below `cache`, by default the user's, or in the temporary folder: see `writable`."""
    found = writable(cache or default_cache(), f"kernels/{digest()}")
    return KernelCache(found.folder, found.refused)


def _cpu() -> Iterator[str]:
    """The lines of this CPU's name and features, or as much as the system says of it."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    yield platform.machine()
    yield from (line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
