"""Checkpoints: a run on its way, kept beside the folder that it will write, from which a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters_store.durable import fsync
from training.errors import OptionError


class Checkpoint:
    """A checkpoint of a run in one file, which is replaced whole.

    `identity` is everything that the run depends on, as JSON has it; a checkpoint of another identity is refused.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.checkpoint")
        self._identity = identity

    def exists(self) -> bool:
        """Tell whether a run has left the file."""
        return self.path.exists()

    def check(self, is_resumed: bool, say: Callable[[str], None]) -> None:
        """Say if there is nothing to resume. Raises `OptionError` if a new run would lose a checkpoint."""
        if is_resumed and not self.exists():
            say(f"--resume: there is no {self.path}, so the run begins anew.")
        if self.exists() and not is_resumed:
            raise OptionError(
                f"{self.path} is what a run to this --out left: go on with --resume, or delete it and begin anew."
            )

    def save(self, state: dict[str, Any]) -> None:
        """Write a trainer's state durably, or leave the old one as it was. Raises `OSError`."""
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            torch.save({"facts": self._identity, "state": state}, new)
            fsync(new)
            new.replace(self.path)
            fsync(self.path.parent)
        except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
            new.unlink(missing_ok=True)
            raise OSError(getattr(error, "errno", None), f"the checkpoint cannot be written: {error}") from error

    def load(self) -> dict[str, Any]:
        """Return the state. Raises `OptionError` for the checkpoint of another run, naming the option that differs."""
        try:
            content = torch.load(self.path, weights_only=True, map_location="cpu")
            identity, state = content["facts"], content["state"]
        except Exception as error:
            raise OptionError(f"{self.path} is no checkpoint ({error}): delete it and begin anew.") from error
        if differing := [name for name in self._identity if identity.get(name) != self._identity[name]]:
            raise OptionError(
                f"{self.path} is of another run: {differing[0]} was {identity.get(differing[0])!r}. "
                "Give the same options, or delete it and begin anew."
            )
        return state  # type: ignore[no-any-return]

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)
