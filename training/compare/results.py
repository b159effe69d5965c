"""Results of a comparison, kept as one JSON file: figures of each method from its manifest and from a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from adapters_store.format.folder import MANIFEST, find_parts, read_manifest
from training.errors import OptionError
from training.evaluation.evaluate import Scores

RESULTS = "compare.json"
FULL = "full"


class Serving(msgspec.Struct):
    """Figures of an adapter on the real engine: decode tokens/s of a batch that uses it, and its share of the base's.

    `load_seconds` is from the upload's first byte to its 201, `slot_bytes` the memory of its slot on the device.
    """

    tokens_per_second: float
    share_of_base: float
    load_seconds: float
    slot_bytes: int


class MethodOutcome(msgspec.Struct):
    """Figures of a method; `memory_bytes` is the peak above the loaded base, `before`, `after` are scores by name."""

    method: str
    trained_parameters: int
    trained_share: float
    artifact_bytes: int
    memory_bytes: int
    steps: int
    seconds: float
    tokens_per_second: float
    before: dict[str, Any]
    after: dict[str, Any]
    serving: Serving | None = None
    not_served: str = ""  # why `serving` is not there

    @property
    def is_peft(self) -> bool:
        """Tell whether the method is PEFT, and not full fine-tuning, which PEFT is compared with."""
        return self.method != FULL


class ServerFigures(msgspec.Struct):
    """Load on the server: requests at once, tokens of each, rounds; and the decode tokens/s of the base."""

    num_requests: int
    num_tokens: int
    num_rounds: int
    base_tokens_per_second: float


class Comparison(msgspec.Struct):
    """Results of every method. `given` is everything that each run depends on, `failed` has reasons by method.

    `before` are the scores of the base, which are taken once.
    """

    given: dict[str, Any]
    command: str = ""
    machine: str = ""
    outcomes: list[MethodOutcome] = []
    failed: dict[str, str] = {}
    server: ServerFigures | None = None
    before: Scores | None = None

    def of(self, method: str) -> MethodOutcome | None:
        """Return the outcome of a method, or None if it has none."""
        return next((outcome for outcome in self.outcomes if outcome.method == method), None)


def outcome_of(method: str, folder: Path) -> MethodOutcome:
    """Read the outcome of a trained method from its manifest."""
    manifest = read_manifest((folder / MANIFEST).read_bytes())
    training = manifest.training
    return MethodOutcome(
        method=method,
        trained_parameters=training["trained_parameters"],
        trained_share=training["trained_share"],
        artifact_bytes=sum(path.stat().st_size for path in find_parts(folder).values()),
        memory_bytes=training["peak_memory_bytes"] - training["base_memory_bytes"],
        steps=training["steps"],
        seconds=training["seconds"],
        tokens_per_second=training["tokens_per_second"],
        before=manifest.evaluation["before"],
        after=manifest.evaluation["after"],
    )


def begin(out: Path, wanted: Comparison) -> Comparison:
    """Return `wanted` for a new folder, or with the base's scores that the same comparison left there.

    Raises `OptionError` if the folder holds another comparison, or something else.
    """
    file = out / RESULTS
    if not file.is_file():
        if out.exists() and any(out.iterdir()):
            raise OptionError(f"--out {out} exists and is no comparison: name a new folder.")
        return wanted
    try:
        earlier = msgspec.json.decode(file.read_bytes(), type=Comparison)
    except msgspec.DecodeError as error:
        raise OptionError(f"{file} cannot be read ({error}): name a new folder.") from error
    if differing := [name for name in wanted.given if earlier.given.get(name) != wanted.given[name]]:
        raise OptionError(
            f"--out {out} is of another comparison: {differing[0]} was {earlier.given.get(differing[0])!r}. "
            "Give the same options, or name a new folder."
        )
    wanted.before = earlier.before
    return wanted


def write(path: Path, data: bytes) -> None:
    """Replace a file as a whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.replace(path)
