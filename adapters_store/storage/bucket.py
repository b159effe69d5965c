"""Store artifacts at an fsspec URL (`s3://bucket/prefix`, `gs://…`, `az://…`): objects `<digest[:2]>/<digest>/<file>`.

Object stores have no rename, but each object is complete or absent. So the weights are written last and deleted first:
an artifact exists while they do. Staging is on the local disk.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.registry import get_filesystem_class

from adapters_store.errors import AbsentError, StoreDownError, StoreError, StoreRefusedError
from adapters_store.format.folder import FILES, WEIGHTS, find_parts
from adapters_store.format.zip_outline import StoredFile
from adapters_store.storage.directory import OWNER, Blobs, absent, limit_s

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
    """The artifacts below a URL. Calls raise `StoreDownError`, whatever the driver raises."""

    def __init__(self, url: str, folder: str | Path) -> None:
        super().__init__(folder)
        self._files, self._prefix = connect(url)

    def put(self, folder: Path, digest: str) -> None:
        """Copy a folder of `staging` into the store; durable on return. A sound artifact is left unchanged."""
        if self.is_whole(digest):
            return
        self.delete(digest)
        for name, path in sorted(find_parts(folder).items(), key=lambda part: part[0] == WEIGHTS):
            data = path.read_bytes()
            self._call(self._files.pipe_file, self._object(digest, name), data, num_bytes=len(data))

    def delete(self, digest: str) -> None:
        """Delete an artifact, its weights first."""
        for name in sorted(self._sizes(digest), key=lambda name: name != WEIGHTS):
            self._call(self._files.rm_file, self._object(digest, name), may_lack=True)

    def digests(self) -> set[str]:
        """Return the digests of all artifacts, complete or not."""
        paths = [PurePosixPath(path).parts for path in self._call(self._files.find, self._prefix)]
        return {parts[-2] for parts in paths if len(parts) > 2 and parts[-3] == parts[-2][:2]}

    def _read(self, digest: str) -> dict[str, bytes]:
        sizes = self._sizes(digest)
        files = {name: self._get(self._object(digest, name), num_bytes) for name, num_bytes in sizes.items()}
        if files.get(WEIGHTS) is None:
            raise absent(digest)
        return {name: data for name, data in files.items() if data is not None}

    def _open(self, digest: str) -> list[StoredFile]:
        sizes = self._sizes(digest)
        if WEIGHTS not in sizes:
            raise absent(digest)
        objects = {name: self._object(digest, name) for name in sizes}
        return [StoredFile(name, sizes[name], partial(self._range, path)) for name, path in objects.items()]

    def _range(self, path: str, start: int, stop: int) -> bytes:
        part = {"start": start, "end": stop}  # by name: drivers do not agree on their places
        data: bytes | None = self._call(self._files.cat_file, path, num_bytes=stop - start, may_lack=True, **part)
        if data is None:
            raise AbsentError(f"{path} is not in the store any more")
        return data

    def _sizes(self, digest: str) -> dict[str, int]:
        """Return the sizes of an artifact's files, by name: how long each may take depends on it."""
        found = self._call(self._files.find, f"{self._prefix}/{digest[:2]}/{digest}", detail=True)
        sizes = {PurePosixPath(path).name: int(facts["size"] or 0) for path, facts in found.items()}
        return {name: sizes[name] for name in FILES if name in sizes}

    def _owner(self) -> str | None:
        owner = self._get(f"{self._prefix}/{OWNER}")
        return None if owner is None else owner.decode()

    def _own(self, owner: str) -> None:
        self._call(self._files.pipe_file, f"{self._prefix}/{OWNER}", owner.encode())

    def _get(self, path: str, num_bytes: int = 0) -> bytes | None:
        """Return an object's bytes, or None if it is absent."""
        data: bytes | None = self._call(self._files.cat_file, path, num_bytes=num_bytes, may_lack=True)
        return data

    def _object(self, digest: str, name: str) -> str:
        return f"{self._prefix}/{digest[:2]}/{digest}/{name}"

    def _call(self, method: Any, *args: object, num_bytes: int = 0, may_lack: bool = False, **kwargs: object) -> Any:
        """Call a method that moves so many bytes. Returns None if `may_lack` and the object is absent.

        One that is late, or fails otherwise, raises `StoreDownError`, or `StoreRefusedError` if it answered.
        """
        if self._files.async_impl:  # of others the driver's own time limits hold
            kwargs["timeout"] = limit_s(num_bytes)
        try:
            return method(*args, **kwargs)
        except TimeoutError as error:
            raise StoreDownError("the store of artifacts does not answer in time") from error
        except FileNotFoundError as error:
            if may_lack:
                return None
            raise StoreRefusedError(f"the store of artifacts is not where it was: {error}") from error
        except PermissionError as error:
            raise StoreRefusedError(f"the store of artifacts refuses access: {error}; check its credentials") from error
        except Exception as error:  # drivers raise errors of all families
            raise StoreDownError(f"the store of artifacts does not answer ({type(error).__name__})") from error


def connect(url: str) -> tuple[Any, str]:
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
