"""`python -m tests.clients.lm_eval_parity`: lm-evaluation-harness's numbers through a server beside PEFT's.

Both run a task of ours, the intents of banking77 as choices, for the base and random adapters of eight methods, in the
environment of `make test-clients`.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from adapters_store.base.resolve import resolve_base
from tests.clients.record import LIVE
from tests.clients.world import SCRIPTS
from tests.kit.adapters import zip_folder
from tests.kit.families import FAMILIES
from tests.kit.tiny import make_tiny_base
from tests.server.world import serve_real

METHODS = ("lora", "dora", "ia3", "loha", "vera", "oft", "prompt-tuning", "ln-tuning")
NUM_CHOICES = 8
ROWS = Path("adapters_store/examples/data/banking77/test.csv")
TASK = """task: intents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Customer: {{{{text}}}}\\nIntent:"
doc_to_target: "{{{{intent}}}}"
doc_to_choice: {choices}
"""


def main() -> None:
    """Print, by method, both accuracies and the largest difference of a choice's log-likelihood."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.lm_eval_parity", description=__doc__)
    parser.add_argument("--base", help="a name, a folder or a hub id; a tiny random one if it is left out")
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        base = resolve_base(arguments.base) if arguments.base else make_tiny_base(here / "base")
        for name, told in asyncio.run(measure(base, here, arguments.rows)).items():
            print(
                f"{name:14} hf {told['hf']['acc']:.4f}  served {told['served']['acc']:.4f}  {difference_of(told):.1e}"
            )


async def measure(base: Path, folder: Path, num_rows: int) -> dict[str, Any]:
    """Run the harness over a server that has the adapters; what it told by adapter, of both."""
    write_task(folder / "tasks", num_rows)
    async with serve_real(base, folder / "data", kv_cache_bytes=2**26) as site:
        adapters = ["base="]
        for name in METHODS:
            made = FAMILIES[name](folder / name, base, 1)
            answered = await site.upload(name, zip_folder(made))
            assert answered.status_code == 201, answered.text
            adapters.append(f"{name}={made}")
        process = await asyncio.create_subprocess_exec(
            str(LIVE / "bin" / "python"),
            "-P",  # a script beside it has the name of the package
            str(SCRIPTS / "lm_eval_parity.py"),
            str(site.http.base_url),
            str(base),
            str(folder / "tasks"),
            *adapters,
            cwd=folder,
            env={**os.environ, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"},
        )
        if await process.wait():
            raise RuntimeError("the harness failed")
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


def write_task(folder: Path, num_rows: int) -> None:
    """Write the task's file and its rows, taken evenly from those of its choices."""
    folder.mkdir()
    with ROWS.open() as file:
        rows = list(csv.DictReader(file))
    intents = list(dict.fromkeys(row["intent"] for row in rows))[:NUM_CHOICES]
    kept = [row for row in rows if row["intent"] in intents]
    chosen = kept[:: max(1, len(kept) // num_rows)][:num_rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (folder / "intents.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", choices=json.dumps(intents)))


def difference_of(told: dict[str, Any]) -> float:
    """The largest difference of a choice's log-likelihood; infinite if another choice is greedy."""
    pairs = list(zip(told["hf"]["choices"], told["served"]["choices"], strict=True))
    if any(theirs[1] != ours[1] for theirs, ours in pairs):
        return float("inf")
    return float(max(abs(theirs[0] - ours[0]) for theirs, ours in pairs))


if __name__ == "__main__":
    main()
