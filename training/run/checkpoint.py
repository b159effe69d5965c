"""A run on its way, kept beside the folder that it will write, so that a run that was killed can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapters_store.durable import fsync
from training.errors import OptionError


class Checkpoint:
    """One file, replaced whole. `facts` are all that the run depends on, as JSON would have them."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.checkpoint")
        self._facts = facts

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, state: dict[str, Any]) -> None:
        """Write it durably, or leave the old one as it was."""
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            torch.save({"facts": self._facts, "state": state}, new)
            fsync(new)
            new.replace(self.path)
            fsync(self.path.parent)
        except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
            new.unlink(missing_ok=True)
            raise OSError(getattr(error, "errno", None), f"the checkpoint cannot be written: {error}") from error

    def load(self) -> dict[str, Any]:
        """The state. Raises `OptionError` for the checkpoint of another run, naming what differs."""
        try:
            kept = torch.load(self.path, weights_only=True, map_location="cpu")
            facts, state = kept["facts"], kept["state"]
        except Exception as error:
            raise OptionError(f"{self.path} is no checkpoint ({error}): delete it and begin anew.") from error
        if differing := [name for name in self._facts if facts.get(name) != self._facts[name]]:
            raise OptionError(
                f"{self.path} is of another run: {differing[0]} was {facts.get(differing[0])!r}. "
                "Give the same options, or delete it and begin anew."
            )
        return state  # type: ignore[no-any-return]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
