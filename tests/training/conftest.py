"""The command `manyhats train` in this process, and a data set that a tiny base can learn."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from training import cli

WORDS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}
TEMPLATE = "Colour: {prompt}\\nFeel: {completion}"


@pytest.fixture(scope="session")
def command() -> Callable[..., Any]:
    """Run `manyhats train` with flags; its result has exit_code and output."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cli.train)

    def run(*flags: object) -> Any:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a tiny base's products are too small to share out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
            result = CliRunner().invoke(app, [str(flag) for flag in flags])
        torch.set_num_threads(num_threads)
        return result

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of two answers. Do not write into it."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{word} {i}", "completion": feel} for word, feel in WORDS.items() for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def flags(base: Path, data: Path, out: Path, *more: object) -> list[object]:
    """Return the flags of a run on `data` with any method."""
    common = ["--base", base, "--data", data, "--eval", data, "--out", out]
    return [*common, "--template", TEMPLATE, "--batch-size", 10, *more]
