"""Select the adapter among the files that a trainer leaves: checkpoints, optimizer states, tokenizers, logs.

Only the selected files are opened. The others are named to whoever uploads them, a tokenizer or a chat template above
all: a server has one base, whose own are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from adapters_store.errors import ArtifactError, ArtifactTypeError
from adapters_store.format.folder import ALIASES, CONFIG, REFUSED, WEIGHTS, find_parts, part_of

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
WEIGHT_STEMS = {Path(name).stem for name in (WEIGHTS, *ALIASES)} | {"pytorch_adapter"}
SAVE_SAFELY = (
    "pickles are never opened; save with save_pretrained(..., safe_serialization=True), "
    "in AdapterHub with save_adapter(..., use_safetensors=True)"
)
# Files of a tokenizer and of what else a base brings itself.
OF_THE_BASE = re.compile(
    r"chat_template(\.\w+)?|additional_chat_templates|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.\w+|merges\.txt|.*\.model|generation_config\.json"
)
MAX_NAMED = 8  # ignored files that are named; the others are counted
MAX_NAME = 100  # characters of a name that are shown


@dataclass(frozen=True)
class ArchiveMember:
    """A file of an archive. `fault` is why it cannot be read, if it cannot: nothing is wrong unless it is selected."""

    path: PurePosixPath
    num_bytes: int
    packed_bytes: int
    fault: str | None
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Selection:
    """The members that make the adapter, by their name in `FILES`, and the paths of all others."""

    wanted: dict[str, ArchiveMember]
    ignored: list[str]


def path_of(name: str) -> PurePosixPath:
    """Return the path of an archive's member, also of one that Windows wrote.

    Raises `ArtifactError` if it points out of the archive.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise ArtifactError(f"the member {name[:MAX_NAME]!r} points out of its folder", name[:MAX_NAME])
    return path


def select_parts(members: Sequence[ArchiveMember]) -> Selection:
    """Select the adapter that is nearest to the root, and none of a checkpoint if there is another.

    Raises `ArtifactError` if there is none or which one is meant cannot be told, `ArtifactTypeError` if its weights
    are a pickle, or `MethodUnsupportedError` for a file beside it that changes the answer and is not served.
    """
    folder = _select_folder([member.path for member in members])
    wanted: dict[str, ArchiveMember] = {}
    for member in members:
        part = part_of(member.path.name) if member.path.parent == folder else None
        if part in wanted:
            raise ArtifactError(f"the folder holds {part} twice: which one counts?", part)
        if part is not None:
            wanted[part] = member
    if WEIGHTS not in wanted:
        _refuse_pickled_weights(member.path for member in members if member.path.parent == folder)
    taken = {member.path for member in wanted.values()}
    return Selection(wanted, [str(member.path) for member in members if member.path not in taken])


def _select_folder(paths: Sequence[PurePosixPath]) -> PurePosixPath:
    folders = dict.fromkeys(path.parent for path in paths if _is_of_an_adapter(path.name))
    if not folders:
        if pickles := [path.name for path in paths if path.suffix.lower() in PICKLE_SUFFIXES]:
            name = pickles[0][:MAX_NAME]
            raise ArtifactTypeError(f"{name} looks like a pickle; {SAVE_SAFELY}", name)
        raise ArtifactError(f"there is no {CONFIG} in it: send the folder that PEFT's save_pretrained wrote", CONFIG)
    first, *others = sorted(folders, key=_distance)
    if others and _distance(others[0]) == _distance(first):
        names = f"{str(first)[:MAX_NAME]} and {str(others[0])[:MAX_NAME]}"
        raise ArtifactError(f"parts of an adapter are in {names}: send one of these folders alone", CONFIG)
    return first


def find_adapter(folder: Path) -> Path | None:
    """Return the folder of the adapter in a folder, at any depth, or None if there is none.

    Raises `ArtifactError` if which one is meant cannot be told.
    """
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if _is_of_an_adapter(path.name))
    paths = [PurePosixPath(*name.parts) for name in names]
    return folder / _select_folder(paths) if paths else None


def _is_of_an_adapter(name: str) -> bool:
    return name in (CONFIG, WEIGHTS, *ALIASES, *REFUSED) or _is_pickled_weights(name)


def _is_pickled_weights(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in PICKLE_SUFFIXES and path.stem in WEIGHT_STEMS


def _distance(folder: PurePosixPath) -> tuple[int, int]:
    """Order folders of adapters: those of checkpoints last, else the one nearest to the root first."""
    return sum(part.lower().startswith("checkpoint") for part in folder.parts), len(folder.parts)


def _refuse_pickled_weights(paths: Iterable[PurePosixPath]) -> None:
    for path in paths:
        if _is_pickled_weights(path.name):
            raise ArtifactTypeError(f"the weights, {path.name}, are a pickle; {SAVE_SAFELY}", path.name)


def find_ignored(folder: Path) -> list[str]:
    """Return the names in a PEFT folder that are no part of the artifact. Raises `ArtifactError`, as `find_parts`."""
    taken = set(find_parts(folder).values())
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path not in taken)


def describe_ignored(ignored: Sequence[str]) -> str:
    """Say in a clause which files are not used, those first that somebody could take for part of the adapter."""
    names = [name[:MAX_NAME] for name in ignored]
    of_the_base = sorted({name for path in names if OF_THE_BASE.fullmatch(name := PurePosixPath(path).name)})
    rest = [path for path in names if PurePosixPath(path).name not in of_the_base]
    told = []
    if of_the_base:
        told.append(
            f"the base's own tokenizer and chat template (or the manifest's) are used, not {_named(of_the_base)}"
        )
    if rest:
        told.append(f"not opened: {_named(rest)}")
    return "; ".join(told)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
