"""llama-server of llama.cpp with 8-bit weights: the same adapters in its own form, `make peer-llama` builds it.

Requests of different adapters never share a batch there. An adapter whose scale a request does not set to 0 is applied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.dialects import Llama as Dialect
from tests.benchmarks.peers import ENVIRONMENTS, Setup
from tests.benchmarks.peers.process import ServerSession, run_once, running
from tests.kit.server import free_port

HOME = ENVIRONMENTS / "llama"
SERVER = HOME / "build" / "bin" / "llama-server"
TOOLS = HOME / "source" / "vendor" / "llama.cpp"
NUM_SLOTS, CONTEXT = 16, 1024  # requests at once, tokens of each


class Llama:
    """See the module."""

    title = "llama-server, Q8_0"
    workloads, once = ("W1", "W3", "W4"), ()

    def missing(self) -> str | None:
        """Whether it was built."""
        return None if SERVER.is_file() else "not installed; `make peer-llama` builds it"

    @contextmanager
    def start(self, setup: Setup) -> Iterator[ServerSession]:
        """Serve the base and all adapters, converted where they are not yet."""
        base, adapters = convert(setup)
        port = free_port()
        threads = str(setup.num_threads)
        words = ["-m", base, "--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
        words += ["-np", NUM_SLOTS, "-c", NUM_SLOTS * CONTEXT, "-t", threads, "-tb", threads, "--no-webui"]
        words += ["--host", "127.0.0.1", "--port", port]
        command = [str(SERVER), *map(str, words)]
        with running(command, setup.scratch / "llama.log", port, {}) as (url, process, seconds):
            yield ServerSession("llama", url, process, Dialect(len(adapters)), {"start_to_ready_s": seconds})


def convert(setup: Setup) -> tuple[Path, list[Path]]:
    """The base and the adapters as GGUF, each made once in `setup.shared`."""
    folder = setup.shared / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    base, log = folder / "base.gguf", folder / "convert.log"
    if not base.exists():
        _tool("convert_hf_to_gguf.py", [setup.base, "--outtype", "q8_0"], base, log)
    adapters = [folder / f"{adapter.name}.gguf" for adapter in setup.adapters]
    for adapter, converted in zip(setup.adapters, adapters, strict=True):
        if not converted.exists():
            _tool("convert_lora_to_gguf.py", ["--base", setup.base, "--outtype", "f16", adapter], converted, log)
    return base, adapters


def _tool(name: str, words: list[str | Path], out: Path, log: Path) -> None:
    """Run one of llama.cpp's converters; a file that is there is whole."""
    unfinished = out.with_suffix(".unfinished")
    run_once([sys.executable, str(TOOLS / name), *map(str, words), "--outfile", str(unfinished)], log)
    unfinished.rename(out)
