"""Kernels are compiled ahead for the very types that a loaded base calls them with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PROGRAM = """
import sys
import torch
from server.model.backends import compile_cpu as ahead
from server.core import RunnerConfig
from server.model.runner import load

folder, precision = sys.argv[1:]
loaded = load(RunnerConfig(folder=folder, name="t", precision=precision, num_threads=1, kv_cache_bytes=2**22))
loaded.runner.base.backend.best_tokens(torch.zeros(1, 5))
samples, compiled = ahead.Samples(loaded.precision), {}
for part in ahead.PARTS.values():
    for kernel, arguments in part(samples):
        compiled.setdefault(kernel, set()).add(ahead.types_of(kernel, arguments))
for kernel, types in compiled.items():
    assert types.issuperset(kernel.overloads), (kernel.py_func.__name__, kernel.overloads, types)
    print(kernel.py_func.__name__, len(kernel.overloads))
"""


@pytest.mark.parametrize("precision", ["fp32", "auto", "int8"])
def test_what_is_compiled_ahead_is_what_is_called(tiny_base: Path, precision: str) -> None:
    """Loading a base calls each kernel with the types of the samples and no others, so it compiles nothing more."""
    command = [sys.executable, "-c", PROGRAM, str(tiny_base), precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    called = {name for name, number in (line.split() for line in done.stdout.splitlines()) if number != "0"}
    assert called >= {"product", "attend", "apply", "enter", "rms_norm", "gate", "best", "decoder_layers"}
    assert called >= {"multiply_loop", "dots_loop"}
