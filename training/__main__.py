"""`python -m training` is `manyhats train`."""

from __future__ import annotations

import typer

from training.cli import train

if __name__ == "__main__":
    typer.run(train)
