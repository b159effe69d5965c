"""`python -m tests.benchmarks.parity`: how far a server of each precision is from a trainer's answers, and may be.

The example is uploaded as it is and with its tensors rounded to bf16; the figure is the door's own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from adapters_store.base.resolve import resolve_base
from adapters_store.format.folder import WEIGHTS
from server.model.backends.cpu.weights import PACKERS
from tests.kit.adapters import zip_folder
from tests.kit.server import serve

EXAMPLE = Path(__file__).parents[2] / "adapters_store/examples/banking77"


def main() -> None:
    """Print a table: the base's precision, the adapter's, the largest error in nats, and what is allowed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parity", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--artifact", type=Path, default=EXAMPLE, help="a folder whose manifest carries parity")
    arguments, console = parser.parse_args(), Console()
    base = resolve_base(arguments.base, progress=console.print)
    table = Table("base", "adapter", "largest error", "allowed", "times")
    for *names, figure, limit in measure(base, arguments.artifact):
        table.add_row(*names, f"{figure:.4f}", f"{limit:g}", f"{limit / max(figure, 1e-9):.0f}")
    console.print(table)


def measure(base: Path, artifact: Path) -> Iterator[tuple[str, str, float, float]]:
    """(precision of the base, of the adapter, error, what is allowed). A refusal raises `httpx2.HTTPStatusError`."""
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(shutil.copytree(artifact, Path(scratch) / "rounded"))
        tensors = load_file(rounded / WEIGHTS)
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, rounded / WEIGHTS)
        for precision in PACKERS:
            with serve(base, Path(scratch) / precision, precision=precision) as server:
                for name, folder in (("as it is", artifact), ("bf16", rounded)):
                    checks = server.upload("parity", zip_folder(folder))["checks"]
                    (check,) = (one for one in checks if one["name"] == "parity")
                    yield precision, name, check["figure"], check["limit"]


if __name__ == "__main__":
    main()
