"""Places that an operator lets adapters be loaded from: folders of this machine, and prefixes of fsspec URLs.

What lies outside is never read: not by `..`, not by a symbolic link, not by a link that is put there meanwhile.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from adapters_store.errors import AbsentError, ArtifactTooLargeError, NotAllowedError, StoreDownError
from adapters_store.format.folder import ALIASES, FILES, REFUSED
from adapters_store.storage.bucket import connect
from adapters_store.storage.directory import limit_s

Count = Callable[[int], None]
NAMES = (*FILES, *ALIASES, *REFUSED)  # what is looked for in a folder; all else is left where it is


class LoadRoot(Protocol):
    """A place with all that lies below it."""

    def holds(self, path: str) -> bool:
        """Whether a path or URL is in it."""
        ...

    def copy(self, path: str, folder: Path, max_bytes: int, count: Count) -> None:
        """Copy the adapter's files at a path that it holds. None of them may be there.

        `count` is told each file's bytes before they are written; what it raises ends all. Raises `NotAllowedError`,
        `ArtifactTooLargeError`, `StoreDownError`.
        """
        ...


def copy_adapter(roots: Sequence[LoadRoot], path: str, folder: Path, count: Count, *, max_bytes: int) -> None:
    """Copy the files of the adapter at a path or URL into a folder.

    Raises `NotAllowedError` if no root holds it, `AbsentError` if there is none, and as `LoadRoot.copy`.
    """
    root = next((root for root in roots if root.holds(path)), None)
    if root is None:
        raise NotAllowedError(f"{path[:200]} is not below a place that this server may load from (--allow-load-from)")
    root.copy(path, folder, max_bytes, count)
    if not any(folder.iterdir()):
        raise AbsentError(f"No adapter found for {path[:200]}")


class FolderRoot:
    """A folder of this machine."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).resolve()

    def holds(self, path: str) -> bool:
        """Whether an absolute path, all links followed, is in the folder."""
        return Path(path).is_absolute() and self._is_within(os.path.realpath(path))

    def copy(self, path: str, folder: Path, max_bytes: int, count: Count) -> None:
        """Copy the files; each is judged by its true place once it is open, whatever its path was before."""
        for name in NAMES:
            with _open(Path(path, name)) as file:
                if file is None:
                    continue
                if not self._is_within(Path(f"/proc/self/fd/{file.fileno()}").readlink()):
                    raise NotAllowedError(f"{name} is a link to where this server may not load from")
                num_bytes = os.fstat(file.fileno()).st_size
                max_bytes -= num_bytes
                _check_size(max_bytes, path)
                count(num_bytes)
                with (folder / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy)

    def _is_within(self, real: str | Path) -> bool:
        return Path(real).is_relative_to(self._folder)


class UrlRoot:
    """A prefix of an fsspec URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files, self._prefix = connect(self._url)

    def holds(self, path: str) -> bool:
        """Whether a URL goes on from the prefix, without a step that could lead back."""
        rest = path.removeprefix(f"{self._url}/")
        return rest != path and not {"", ".", ".."}.intersection(rest.rstrip("/").split("/"))

    def copy(self, path: str, folder: Path, max_bytes: int, count: Count) -> None:
        """Copy the objects whose sizes together are within the bound."""
        inside = f"{self._prefix}/{path.removeprefix(f'{self._url}/').rstrip('/')}"
        found: dict[str, Any] = self._call(self._files.find, inside, maxdepth=1, detail=True) or {}
        sizes = {PurePosixPath(key).name: int(facts["size"] or 0) for key, facts in found.items()}
        for name in (name for name in NAMES if name in sizes):
            max_bytes -= sizes[name]
            _check_size(max_bytes, path)
            count(sizes[name])
            data = self._call(self._files.cat_file, f"{inside}/{name}", num_bytes=sizes[name])
            if data is not None:
                (folder / name).write_bytes(data)

    def _call(self, method: Any, *args: object, num_bytes: int = 0, **kwargs: object) -> Any:
        """Call a method that moves so many bytes; None if the object is absent. Raises `StoreDownError`."""
        if self._files.async_impl:
            kwargs["timeout"] = limit_s(num_bytes)
        try:
            return method(*args, **kwargs)
        except FileNotFoundError:
            return None
        except Exception as error:  # drivers raise errors of all families
            raise StoreDownError(f"{self._url} does not answer ({type(error).__name__})") from error


def open_roots(places: Sequence[str]) -> list[LoadRoot]:
    """Open each place, a path or a URL. Raises `StoreError` for a missing driver or a bad URL."""
    return [UrlRoot(place) if "://" in place else FolderRoot(place) for place in places]


def _check_size(left: int, path: str) -> None:
    if left < 0:
        raise ArtifactTooLargeError(f"the adapter at {path[:200]} is larger than an upload may be")


def _open(path: Path) -> AbstractContextManager[BinaryIO | None]:
    """Open a regular file without waiting; for what is none there is nothing. Raises `NotAllowedError`."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return nullcontext()
    except OSError as error:
        raise NotAllowedError(f"{path.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        return nullcontext()
    return os.fdopen(number, "rb")
