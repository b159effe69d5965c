"""`python -m tests.benchmarks.precision`: what weights in fewer bits cost in quality, on a text that nobody trained on.

Perplexity over windows of the corpus, and how near the distributions of the next token are to those of 32 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from adapters_store.base.resolve import resolve_base
from server.core import Row, RunnerConfig
from server.model.attention.paged_batch import page
from server.model.backends.cpu.weights import PACKERS
from server.model.runner import load
from tests.benchmarks.workload import CORPUS

WINDOW, NUM_WINDOWS = 512, 16
EXACT = "fp32"


def main() -> None:
    """Print a table with a row for each precision."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.precision", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--windows", type=int, default=NUM_WINDOWS, help=f"of {WINDOW} tokens")
    arguments, console = parser.parse_args(), Console()
    base = resolve_base(arguments.base, progress=console.print)
    tokens = AutoTokenizer.from_pretrained(base)(CORPUS.read_text(), verbose=False).input_ids
    windows = [tokens[at * WINDOW : (at + 1) * WINDOW] for at in range(arguments.windows)]
    table = Table("precision", "perplexity", f"KL to {EXACT}", f"best token as {EXACT}")
    sums = compare(base, windows)
    for precision, (loss, divergence, agreement) in sums.items():
        table.add_row(precision, f"{torch.tensor(loss).exp():.3f}", f"{divergence:.1e}", f"{agreement:.2%}")
    console.print(table)


def compare(base: Path, windows: list[list[int]]) -> dict[str, tuple[float, float, float]]:
    """Per precision the mean loss of a token, the mean KL divergence from fp32, and the share of equal best tokens."""
    exact = list(_log_probs(base, EXACT, windows))
    return {precision: _against(exact, _log_probs(base, precision, windows), windows) for precision in PACKERS}


def _against(exact: list[Tensor], found: Iterator[Tensor], windows: list[list[int]]) -> tuple[float, float, float]:
    rows = []
    for wanted, got, window in zip(exact, found, windows, strict=True):
        loss = functional.nll_loss(got[:-1], torch.tensor(window[1:]), reduction="none")
        divergence = (wanted.exp() * (wanted - got)).sum(-1)[:-1]
        rows.append(torch.stack([loss, divergence, (wanted.argmax(-1) == got.argmax(-1))[:-1].float()]))
    loss, divergence, agreement = torch.cat(rows, 1).double().mean(1).tolist()
    return loss, divergence, agreement


@torch.inference_mode()
def _log_probs(base: Path, precision: str, windows: list[list[int]]) -> Iterator[Tensor]:
    """[tokens, vocabulary] of each window."""
    runner = load(RunnerConfig(folder=str(base), name="base", precision=precision)).runner
    blocks = list(range(-(-WINDOW // runner.block_size)))
    for window in windows:
        paged = page([Row(window, 0, blocks)], runner.cache, runner.num_threads)
        positions = torch.arange(len(window))
        yield runner.base.forward(torch.tensor(window), positions, positions, paged).log_softmax(-1)


if __name__ == "__main__":
    main()
