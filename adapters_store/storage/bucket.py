"""Store artifacts at an fsspec URL (`s3://bucket/prefix`, `gs://…`, `az://…`): objects `<digest[:2]>/<digest>/<file>`.

Object stores have no rename, but each object is complete or absent. So the weights are written last and deleted first:
an artifact exists while they do. Staging is on the local disk.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.registry import get_filesystem_class

from adapters_store.errors import AbsentError, StoreError
from adapters_store.format.folder import FILES, WEIGHTS, find_parts
from adapters_store.storage.directory import OWNER, Blobs

EXTRAS = {"s3": "manyhats[s3]", "s3a": "manyhats[s3]"}  # packages to install, by scheme
UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}  # two processes write: API and engine


def open_blobs(store: str | None, folder: Path) -> Blobs:
    """Open the store at a folder or URL (None: `folder`, which has the staging area in any case).

    Raises `StoreError`.
    """
    scheme, separator, rest = (store or "").partition("://")
    if not store:
        return Blobs(folder)
    if not separator or scheme == "file":
        return Blobs(rest if separator else store)
    return Bucket(store, folder)


class Bucket(Blobs):
    """The artifacts below a URL. Every call may raise `OSError`, with `EIO` if the store does not answer."""

    def __init__(self, url: str, folder: str | Path) -> None:
        super().__init__(folder)
        self._files, self._prefix = _connect(url)

    def put(self, folder: Path, digest: str) -> None:
        """Copy a folder of `staging` into the store; durable on return. A sound artifact is left unchanged."""
        if self.is_whole(digest):
            return
        self.delete(digest)
        for name, path in sorted(find_parts(folder).items(), key=lambda part: part[0] == WEIGHTS):
            with _told():
                self._files.pipe_file(self._object(digest, name), path.read_bytes())

    def delete(self, digest: str) -> None:
        """Delete an artifact, its weights first."""
        for name in sorted(FILES, key=lambda name: name != WEIGHTS):
            with _told():
                if self._files.exists(self._object(digest, name)):
                    self._files.rm_file(self._object(digest, name))

    def digests(self) -> set[str]:
        """Return the digests of all artifacts, complete or not."""
        with _told():
            paths = [PurePosixPath(path).parts for path in self._files.find(self._prefix)]
        return {parts[-2] for parts in paths if len(parts) > 2 and parts[-3] == parts[-2][:2]}

    def _read(self, digest: str) -> dict[str, bytes]:
        files = {name: self._get(f"{digest[:2]}/{digest}/{name}") for name in FILES}
        if files[WEIGHTS] is None:
            raise AbsentError(f"no artifact {digest[:12]} in the store")
        return {name: data for name, data in files.items() if data is not None}

    def _owner(self) -> str | None:
        owner = self._get(OWNER)
        return None if owner is None else owner.decode()

    def _own(self, owner: str) -> None:
        with _told():
            self._files.pipe_file(f"{self._prefix}/{OWNER}", owner.encode())

    def _get(self, name: str) -> bytes | None:
        """Return an object's bytes, or None if it is absent."""
        try:
            with _told():
                data: bytes = self._files.cat_file(f"{self._prefix}/{name}")
                return data
        except FileNotFoundError:
            return None

    def _object(self, digest: str, name: str) -> str:
        return f"{self._prefix}/{digest[:2]}/{digest}/{name}"


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. Raises `StoreError` for a missing driver or a bad URL."""
    scheme = url.partition("://")[0]
    try:
        get_filesystem_class(scheme)
        files, prefix = fsspec.core.url_to_fs(url, **UNCACHED)
    except ImportError as error:
        package = EXTRAS.get(scheme)
        hint = f"pip install '{package}'" if package else str(error)
        raise StoreError(f"the driver of {scheme}:// is not installed: {hint}") from None
    except ValueError as error:
        raise StoreError(f"{url} is no store: {error}") from None
    return files, prefix.rstrip("/")


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors of all families, which drivers raise, into `OSError`: the store failed to answer."""
    try:
        yield
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise OSError(errno.EIO, f"the store answered {type(error).__name__}") from error
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"the store does not answer ({type(error).__name__})") from error
