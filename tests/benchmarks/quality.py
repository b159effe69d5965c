"""What the defaults of `manyhats train` learn on the real base in a given time: `python -m tests.benchmarks.quality`.

Exact match of the whole free answer, on the 400 test rows that are in the repository, the base's own score beside it:
of its free answers, and with the best of the labels by its logits. About a quarter of an hour on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

DATA = Path(__file__).parent.parent.parent / "adapters_store" / "examples" / "data"
TASKS = {
    "banking77": ("intent", "Customer: {prompt}\\nIntent: {completion}"),
    "vader": ("sentiment", "Review: {prompt}\\nSentiment: {completion}"),
}


class Aim(msgspec.Struct):
    """A method on a task, the seconds that it gets, and the share of exact answers to reach."""

    task: str
    method: str
    max_seconds: int
    to_reach: float


AIMS = [
    Aim("banking77", "lora", 120, 0.90),
    Aim("banking77", "bottleneck", 120, 0.88),
    Aim("vader", "lora", 120, 0.85),
    Aim("vader", "prompt_tuning", 300, 0.75),
]


def some_rows(file: Path, count: int | None, out: Path) -> Path:
    """`count` rows of a CSV file, spread over it, as a file of their own; all of them: the file itself."""
    if count is None:
        return file
    with file.open(newline="") as rows, out.open("w", newline="") as few:
        head, *body = csv.reader(rows)
        csv.writer(few).writerows([head, *(body[i * len(body) // count] for i in range(min(count, len(body))))])
    return out


def train(aim: Aim, out: Path, seconds: float, num_rows: int | None) -> dict[str, Any]:
    """The manifest of one run of the command, with the method's defaults."""
    test = some_rows(DATA / aim.task / "test.csv", num_rows, out.with_suffix(".csv"))
    words = ["--method", aim.method, "--data", DATA / aim.task / "train.csv", "--eval", test]
    column, template = TASKS[aim.task]
    words += ["--prompt-column", "text", "--completion-column", column, "--template", template]
    words += ["--max-seconds", seconds, "--out", out]
    subprocess.run([sys.executable, "-m", "training", *map(str, words)], check=True)
    manifest: dict[str, Any] = msgspec.json.decode((out / "manifest.json").read_bytes())
    return manifest


def line(aim: Aim, manifest: dict[str, Any]) -> str:
    """A row of the table."""
    scores, seconds = manifest["evaluation"], manifest["training"]["seconds"]
    before, after = scores["before"], scores["after"]
    reached = "yes" if after["exact_match"] >= aim.to_reach else "**no**"
    shares = [
        before["exact_match"],
        before["label_accuracy"],
        after["exact_match"],
        after["label_accuracy"],
        aim.to_reach,
    ]
    cells = [
        aim.task,
        aim.method,
        f"{seconds:.0f} s",
        str(after["num_rows"]),
        *(f"{share:.1%}" for share in shares),
        reached,
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """| task | method | trained | rows | base: free | base: label | exact match | label | to reach | reached |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Train, one after another, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of quality.md and quality.json")
    parser.add_argument("--share", type=float, default=1.0, help="of each one's seconds, to try it (1)")
    parser.add_argument("--rows", type=int, help="how many test rows, to try it (all 400)")
    parser.add_argument("--methods", help="only these, joined by commas, to try it (all)")
    arguments = parser.parse_args()
    known = {aim.method for aim in AIMS}
    chosen = known if arguments.methods is None else set(arguments.methods.split(","))
    if unknown := chosen - known:
        parser.error(f"--methods names {min(unknown)}: there are {', '.join(sorted(known))}")
    manifests, lines = [], [HEAD]
    with tempfile.TemporaryDirectory() as scratch:
        for number, aim in enumerate(aim for aim in AIMS if aim.method in chosen):
            seconds, out = aim.max_seconds * arguments.share, Path(scratch) / str(number)
            manifests.append(train(aim, out, seconds, arguments.rows))
            lines.append(line(aim, manifests[-1]))
            print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quality.json").write_bytes(msgspec.json.encode([m["evaluation"] for m in manifests]))
    (arguments.out / "quality.md").write_text("\n".join(lines) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
