"""The machine's own limit, measured in the same run: how fast it multiplies and reads."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.benchmarks.workload import Workload

SIDE = 2048  # of the square product
READ_FLOATS = 2**26  # 256 MiB: more than any cache
WEIGHT_BYTES = 2  # the fewest that our server keeps of a weight with its full quality
PACKAGES = ("torch", "transformers", "peft", "numba")


class Machine(msgspec.Struct):
    """Where a run was made, and its limits in fp32: GFLOP/s of a matrix product, GB/s of a sum over memory."""

    cpu: str
    num_cpus: int
    num_threads: int
    load_before: float  # the 1-minute load average: over about 0.5, something else was running
    gemm_gflop_per_s: float
    read_gb_per_s: float
    versions: dict[str, str]


def measure(num_threads: int) -> Machine:
    """Measure the limits; a second or two."""
    torch.set_num_threads(num_threads)
    square, long = torch.randn(SIDE, SIDE), torch.ones(READ_FLOATS)
    gemm = 2 * SIDE**3 / best_seconds(lambda: square @ square) / 1e9
    read = 4 * READ_FLOATS / best_seconds(long.sum) / 1e9
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    return Machine(_cpu(), os.cpu_count() or 0, num_threads, os.getloadavg()[0], gemm, read, versions)


def best_seconds(work: Callable[[], object], num: int = 5) -> float:
    """The fastest of `num` runs after one to warm up."""
    work()
    times = []
    for _ in range(num):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def limit_tokens_per_s(machine: Machine, base: Path, workload: Workload) -> float | None:
    """Output tokens/s if nothing but the base's linear layers ran at the measured rates.

    2 FLOP per weight for every prompt and output token (the head's only for output tokens), and every weight read once,
    in 16 bits, for each step of `concurrency` output tokens; whichever of the two takes longer. A prefix counts
    once for each adapter. None for an open loop, whose pace is given.
    """
    if workload.load is not None:
        return None
    num_linear, num_head = count_weights(base)
    num_output = sum(request.max_tokens for request in workload.requests)
    num_prompt = sum(request.num_prompt for request in workload.requests)
    num_prompt += workload.num_prefix * len({request.adapter for request in workload.requests})
    flop = 2 * (num_linear * (num_prompt + num_output) + num_head * num_output)
    read = WEIGHT_BYTES * (num_linear + num_head) * num_output / workload.concurrency
    return num_output / max(flop / (machine.gemm_gflop_per_s * 1e9), read / (machine.read_gb_per_s * 1e9))


def count_weights(base: Path) -> tuple[int, int]:
    """(weights of the linear layers, weights of the head)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sum(linear.weight.numel() for linear in linears), head.weight.numel()


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
