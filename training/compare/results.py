"""What was measured of each method: read from its manifest, and from the server that wore it. Kept as one JSON file."""

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
    """Of one adapter on the real engine: decode tokens/s of a batch that wears it, and their share of the base's.

    `load_seconds` is from the upload's first byte to 201, `slot_bytes` what it takes on the device.
    """

    tokens_per_second: float
    share_of_base: float
    load_seconds: float
    slot_bytes: int


class MethodOutcome(msgspec.Struct):
    """One method. `memory_bytes` is the peak above the loaded base; `before` and `after` are scores by name."""

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
        """Whether it is one of those that full fine-tuning is compared with."""
        return self.method != FULL


class ServerFigures(msgspec.Struct):
    """How it was asked: requests at once, tokens of each, rounds; and the decode tokens/s of the base."""

    num_requests: int
    num_tokens: int
    num_rounds: int
    base_tokens_per_second: float


class Comparison(msgspec.Struct):
    """All of it. `given` is all that every method's run depends on, `failed` has reasons by method.

    `before` are the base's scores, which are taken once.
    """

    given: dict[str, Any]
    command: str = ""
    machine: str = ""
    outcomes: list[MethodOutcome] = []
    failed: dict[str, str] = {}
    server: ServerFigures | None = None
    before: Scores | None = None

    def of(self, method: str) -> MethodOutcome | None:
        """What came out of a method, if anything did."""
        return next((outcome for outcome in self.outcomes if outcome.method == method), None)


def outcome_of(method: str, folder: Path) -> MethodOutcome:
    """What the manifest of a trained method says."""
    manifest = read_manifest((folder / MANIFEST).read_bytes())
    said = manifest.training
    return MethodOutcome(
        method=method,
        trained_parameters=said["trained_parameters"],
        trained_share=said["trained_share"],
        artifact_bytes=sum(path.stat().st_size for path in find_parts(folder).values()),
        memory_bytes=said["peak_memory_bytes"] - said["base_memory_bytes"],
        steps=said["steps"],
        seconds=said["seconds"],
        tokens_per_second=said["tokens_per_second"],
        before=manifest.evaluation["before"],
        after=manifest.evaluation["after"],
    )


def begin(out: Path, wanted: Comparison) -> Comparison:
    """`wanted`, in a new folder or in that of the same comparison. Raises `OptionError` where it is another's."""
    file = out / RESULTS
    if not file.is_file():
        if out.exists() and any(out.iterdir()):
            raise OptionError(f"--out {out} exists and is no comparison: name a new folder.")
        return wanted
    try:
        known = msgspec.json.decode(file.read_bytes(), type=Comparison)
    except msgspec.DecodeError as error:
        raise OptionError(f"{file} cannot be read ({error}): name a new folder.") from error
    if differing := [name for name in wanted.given if known.given.get(name) != wanted.given[name]]:
        raise OptionError(
            f"--out {out} is of another comparison: {differing[0]} was {known.given.get(differing[0])!r}. "
            "Give the same options, or name a new folder."
        )
    wanted.before = known.before
    return wanted


def write(path: Path, data: bytes) -> None:
    """Replace a file whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.replace(path)
