"""A store at a URL: S3 as moto's HTTP server speaks it, and what goes wrong there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from adapters_store.errors import AbsentError, ArtifactCorruptError, StoreDownError, StoreError, StoreRefusedError
from adapters_store.format.folder import CONFIG, WEIGHTS, read_folder
from adapters_store.storage import bucket
from adapters_store.storage.bucket import Bucket, open_blobs
from adapters_store.storage.directory import Blobs
from tests.kit.adapters import make_lora
from tests.kit.services import s3


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a real HTTP server with the bucket `adapters`."""
    with s3(tmp_path_factory.mktemp("moto"), "hats") as environment:
        yield environment


@pytest.fixture
def store(endpoint: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty prefix of the bucket."""
    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)
    opened = open_blobs(f"s3://hats/{tmp_path.name}", tmp_path / "local")
    assert isinstance(opened, Bucket)
    return opened


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(tmp_path_factory.mktemp("lora") / "a", tiny_base, 0, r=2, target_modules=["q_proj"])


def put(store: Blobs, lora: Path) -> str:
    """Put an adapter as an upload does; its digest."""
    digest = read_folder(lora).digest
    with store.staging() as staging:
        folder = shutil.copytree(lora, staging / "f")
        store.put(folder, digest)
    return digest


def test_what_is_put_is_read(store: Bucket, lora: Path) -> None:
    """An artifact comes back with its bytes verified, is listed, put twice is there once, and deleted is absent."""
    digest = put(store, lora)
    assert put(store, lora) == digest
    assert store.read(digest).digest == digest and store.digests() == {digest}
    assert store.files(digest) == {name: (lora / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    store.delete(digest)
    store.delete(digest)
    assert store.digests() == set()
    with pytest.raises(AbsentError):
        store.read(digest)


def test_two_servers_see_the_same(store: Bucket, lora: Path, tmp_path: Path) -> None:
    """An artifact that one process writes or deletes is seen by another at once: nothing is cached."""
    other = open_blobs(f"s3://hats/{tmp_path.name}", tmp_path / "elsewhere")
    with pytest.raises(AbsentError):
        other.read(read_folder(lora).digest)
    digest = put(store, lora)
    assert other.read(digest).digest == digest
    store.delete(digest)
    with pytest.raises(AbsentError):
        other.read(digest)


def test_a_flipped_bit_is_corrupt_and_a_new_upload_heals_it(store: Bucket, lora: Path) -> None:
    """Bytes that are not those that were put are never served; the same upload again replaces them."""
    digest = put(store, lora)
    name = store._object(digest, WEIGHTS)
    data = bytearray(store._files.cat_file(name))
    data[-1] ^= 1
    store._files.pipe_file(name, bytes(data))
    with pytest.raises(ArtifactCorruptError, match="digest"):
        store.read(digest)
    store._files.rm_file(store._object(digest, CONFIG))
    with pytest.raises(ArtifactCorruptError):
        store.read(digest)
    put(store, lora)
    assert store.is_whole(digest)


def test_half_an_upload_is_absent(store: Bucket, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that breaks off before its weights, which come last, is absent, and swept at start."""
    pipe_file = store._files.pipe_file

    def broken(path: str, data: bytes, **limits: float) -> None:
        if path.endswith(WEIGHTS):
            raise RuntimeError("the network is away")
        pipe_file(path, data, **limits)

    with monkeypatch.context() as patched:
        patched.setattr(store._files, "pipe_file", broken)
        with pytest.raises(OSError, match="does not answer") as raised:
            put(store, lora)
    assert raised.value.errno == errno.EIO
    digest = read_folder(lora).digest
    with pytest.raises(AbsentError):
        store.read(digest)
    assert store.digests() == {digest}
    assert store.sweep(set()) == 1 and store.digests() == set()


@pytest.mark.parametrize("is_local", [True, False])
def test_a_store_is_one_registrys(store: Bucket, lora: Path, tmp_path: Path, is_local: bool) -> None:
    """A store belongs to the registry that opens it first; another is refused before it could sweep."""
    mine: Blobs = Blobs(tmp_path / "folder") if is_local else store
    assert not mine.claim("first"), "only now: nothing may be swept by what it did not refer to"
    digest = put(mine, lora)
    assert mine.claim("first")
    with pytest.raises(StoreError, match="another registry"):
        mine.claim("second")
    assert mine.digests() == {digest}


def test_a_driver_that_is_missing_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL whose driver is not installed says what to install; one of no scheme, and no bucket, are sentences too."""

    def missing(_scheme: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    with pytest.raises(StoreError, match="nonsense"):
        open_blobs("nonsense://x", tmp_path)
    monkeypatch.setattr(bucket, "get_filesystem_class", missing)
    with pytest.raises(StoreError, match=r"pip install 'manyhats\[s3\]'"):
        open_blobs("s3://x/y", tmp_path)
    with pytest.raises(StoreError, match="install gcsfs"):
        open_blobs("gs://x", tmp_path)


def test_local_folders(tmp_path: Path) -> None:
    """A store without a URL is a folder: the given one, or the data folder's own."""
    for given, root in ((None, tmp_path), ("", tmp_path), ("/x/y", Path("/x/y")), ("file:///x/y", Path("/x/y"))):
        opened = open_blobs(given, tmp_path)
        assert type(opened) is Blobs and opened.root == root


# Every call of a store, and the method of the driver that it needs.
CALLS: dict[str, tuple[str, Callable[[Blobs, Path], object]]] = {
    "put": ("pipe_file", put),
    "delete": ("rm_file", lambda store, lora: store.delete(read_folder(lora).digest)),
    "digests": ("find", lambda store, _lora: store.digests()),
    "read": ("cat_file", lambda store, lora: store.read(read_folder(lora).digest)),
    "files": ("cat_file", lambda store, lora: store.files(read_folder(lora).digest)),
    "outline": ("cat_file", lambda store, lora: store.outline(read_folder(lora).digest)),
    "check": ("cat_file", lambda store, _lora: store.check()),
    "claim": ("cat_file", lambda store, _lora: store.claim("me")),
    "claim anew": ("pipe_file", lambda store, _lora: store.claim("me")),
}
# Errors of drivers, and whether the store answered.
FAULTS: list[tuple[Exception, bool]] = [
    (PermissionError("Access Denied"), True),
    (OSError(errno.EBUSY, "Please reduce your request rate."), False),
    (TimeoutError(), False),
    (ConnectionResetError(), False),
    (NoCredentialsError(), False),
    (ClientError({"Error": {"Code": "InvalidAccessKeyId"}}, "GetObject"), False),
    (ValueError("no"), False),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("fault", "answered"), FAULTS, ids=lambda value: type(value).__name__)
def test_whatever_a_driver_raises_is_a_store_that_is_down(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: Exception, answered: bool
) -> None:
    """Every fault in every call is `StoreDownError` with a sentence; one of a store that answered opens no breaker."""
    store = Bucket(f"memory://{tmp_path.name}", tmp_path / "local")
    method, act = CALLS[call]
    if call not in ("put", "claim anew"):
        store.claim("me")
        put(store, lora)

    def fail(*_arguments: object, **_keywords: object) -> None:
        raise fault

    monkeypatch.setattr(store._files, method, fail)
    with pytest.raises(StoreDownError, match="the store of artifacts ") as caught:
        act(store, lora)
    assert (type(caught.value) is StoreRefusedError) is answered


def test_a_bucket_that_is_not_there_is_told(store: Bucket, lora: Path) -> None:
    """A bucket that was deleted is a store that refuses, not an artifact that is absent."""
    gone = open_blobs("s3://never-made/x", store.root)
    with pytest.raises(StoreRefusedError, match=r"is not where it was: .*bucket"):
        put(gone, lora)
