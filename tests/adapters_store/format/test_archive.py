"""Uploads: what becomes a PEFT folder, and what is refused with nothing written outside of it."""

from __future__ import annotations

import gzip
import json
import pickle
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters_store.errors import ArtifactError
from adapters_store.format.archive import unpack_upload, zipped
from adapters_store.format.folder import CONFIG, FILES, MANIFEST, WEIGHTS, read_files, read_folder
from tests.kit.forge import digest_of, sound_members, tar_of, toy_config, toy_folder, toy_manifest, toy_tensors, zip_of

MAX_BYTES = 4 * 2**20
INVALID, TOO_LARGE, TYPE = "artifact_invalid", "artifact_too_large", "artifact_type"


class Room:
    """A place to unpack into, that notices what is written beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.body, self.into = root, root / "body", root / "inside" / "folder"
        self.into.mkdir(parents=True)

    def unpack(self, data: bytes) -> Path:
        """Unpack an upload."""
        self.body.write_bytes(data)
        self.ignored = unpack_upload(self.body, self.into, MAX_BYTES)
        return self.into

    def is_clean(self) -> bool:
        """Whether nothing was written but an artifact's files in their folder."""
        written = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}
        return written <= {"body", *(f"inside/folder/{name}" for name in FILES)}


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_a_zip_becomes_the_folder_it_was(room: Room, tmp_path: Path) -> None:
    """Packed and unpacked, an artifact has the same digest; packing twice gives the same bytes."""
    folder = toy_folder(tmp_path / "hat", manifest=toy_manifest())
    (folder / "README.md").write_text("not part of it")
    for name in ("one.zip", "two.zip"):
        (tmp_path / name).write_bytes(zipped(read_files(folder)))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert sorted(archive.namelist()) == sorted(FILES)
    assert digest_of(room.unpack((tmp_path / "one.zip").read_bytes())) == digest_of(folder)
    assert sorted(path.name for path in room.into.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("compress", [False, True])
def test_one_folder_around_the_files_is_allowed(room: Room, compress: bool) -> None:
    """A zip of the folder itself is accepted, with what PEFT and macOS add to it; extra files are dropped."""
    members = {f"hat/{name}": data for name, data in sound_members().items()}
    extras = {"hat/": b"", "hat/README.md": b"hi", "hat/tokenizer.json": b"{}", "__MACOSX/hat/._" + CONFIG: b"\0\5"}
    room.unpack(zip_of({**extras, **members}, compress))
    assert read_folder(room.into).config == toy_config()
    assert sorted(path.name for path in room.into.iterdir()) == [CONFIG, WEIGHTS]


def test_a_single_file_carries_its_config_and_manifest(room: Room) -> None:
    """A safetensors file with config and manifest in its metadata becomes a complete folder."""
    metadata = {"adapter_config": json.dumps(toy_config()), "manifest": json.dumps({"format_version": 1})}
    room.unpack(save(toy_tensors(), metadata=metadata))
    assert json.loads((room.into / CONFIG).read_text()) == toy_config()
    assert json.loads((room.into / MANIFEST).read_text()) == {"format_version": 1}
    (room.into / MANIFEST).unlink()
    tensors = read_folder(room.into).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in toy_tensors().items())


@pytest.mark.parametrize("start", [b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"PK"])
def test_a_header_whose_length_begins_as_a_pickle(room: Room, start: bytes) -> None:
    """Safetensors that begin with a pickle's or a zip's first bytes, as a header's length, are what they are."""
    whole = save(toy_tensors(), metadata={"adapter_config": json.dumps(toy_config())})
    size = int.from_bytes(whole[:8], "little")
    length = int.from_bytes(start + b"\1", "little")
    padded = length.to_bytes(8, "little") + whole[8 : 8 + size].ljust(length) + whole[8 + size :]
    room.unpack(zip_of({**SOUND, WEIGHTS: padded}))
    room.unpack(padded)
    assert read_folder(room.into).tensors.keys() == toy_tensors().keys()


def link(name: str, mode: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    """A member that is no plain file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o777) << 16
    return info


def spoilt(data: bytes, at: bytes, offset: int, value: bytes) -> bytes:
    """A zip with bytes of its records overwritten: the last one that begins with `at`."""
    place = data.rindex(at) + offset
    return data[:place] + value + data[place + len(value) :]


SOUND = sound_members()
PICKLE = pickle.dumps({"lora": [1.0]})
BOMB = {CONFIG: SOUND[CONFIG], WEIGHTS: b"\0" * (MAX_BYTES - 10_000)}
END, CENTRAL = b"PK\5\6", b"PK\1\2"
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", INVALID, "neither a zip nor a tar.gz"),
    "not a zip": (b"hello" * 100, INVALID, "neither a zip nor a tar.gz"),
    "a bare pickle": (PICKLE, TYPE, "safe_serialization=True"),
    "cut in half": (zip_of(SOUND)[:300], INVALID, "not a sound zip"),
    "adapter_model.bin": (zip_of({CONFIG: b"{}", "adapter_model.bin": b"x"}), TYPE, "adapter_model.bin, are a pickle"),
    "AdapterHub's pickle": (zip_of({CONFIG: b"{}", "pytorch_adapter.bin": b"x"}), TYPE, "pytorch_adapter.bin, are a"),
    "capital .PT": (zip_of({CONFIG: b"{}", "adapter_model.PT": b""}), TYPE, "adapter_model.PT, are a pickle"),
    "a pickle alone": (zip_of({"out/x.pkl": b""}), TYPE, "x.pkl looks like a pickle"),
    "pickles before good checkpoints": (
        zip_of({CONFIG: b"{}", "adapter_model.bin": b"x", **{f"checkpoint-9/{name}": SOUND[name] for name in SOUND}}),
        TYPE,
        "adapter_model.bin, are a pickle",
    ),
    "a pickle named as weights": (zip_of({**SOUND, WEIGHTS: PICKLE}), TYPE, "pickle or a zip by its content"),
    "a pickle named as config": (zip_of({**SOUND, CONFIG: PICKLE}), TYPE, "pickle or a zip by its content"),
    "torch's zip named as weights": (zip_of({**SOUND, WEIGHTS: zip_of({"data": b""})}), TYPE, "by its content"),
    "torch's own file": (zip_of({"archive/data.pkl": PICKLE, "archive/data/0": b"x"}), TYPE, "data.pkl looks"),
    "../": (zip_of({**SOUND, "../evil": b"x"}), INVALID, r"'../evil' points out"),
    "../ before the weights": (zip_of({CONFIG: SOUND[CONFIG], f"../{WEIGHTS}": SOUND[WEIGHTS]}), INVALID, "points out"),
    "../ inside": (zip_of({**SOUND, "a/../../evil": b"x"}), INVALID, "points out"),
    "absolute": (zip_of({**SOUND, "/evil": b"x"}), INVALID, "'/evil' points out"),
    "a drive": (zip_of({**SOUND, "C:/evil": b"x"}), INVALID, "points out"),
    "backslashes": (zip_of({**SOUND, "..\\evil": b"x"}), INVALID, "points out"),
    "a link to the config": (zip_of([(WEIGHTS, b"x"), (link(CONFIG), b"/etc/passwd")]), INVALID, f"{CONFIG} is a link"),
    "a link to the weights": (zip_of([(CONFIG, SOUND[CONFIG]), (link(WEIGHTS), b"/etc/passwd")]), INVALID, "is a link"),
    "a device": (zip_of([(WEIGHTS, b"x"), (link(CONFIG, stat.S_IFCHR), b"")]), INVALID, "is a link or a device"),
    "two folders": (
        zip_of({f"a/{CONFIG}": SOUND[CONFIG], f"b/{WEIGHTS}": SOUND[WEIGHTS]}),
        INVALID,
        "parts of an adapter are in a and b",
    ),
    "two checkpoints": (
        zip_of({f"checkpoint-{step}/{name}": SOUND[name] for step in (5, 10) for name in SOUND}),
        INVALID,
        "parts of an adapter are in checkpoint-5 and checkpoint-10",
    ),
    "no adapter": (zip_of({f"f{i}": b"" for i in range(65)}), INVALID, f"there is no {CONFIG}"),
    "30,000 members": (zip_of({f"f{i}": b"" for i in range(30_000)}), TOO_LARGE, "directory"),
    "a bomb": (zip_of(BOMB, compress=True), TOO_LARGE, "zip bomb"),
    "more than is taken": (zip_of({CONFIG: SOUND[CONFIG], WEIGHTS: bytes(MAX_BYTES)}), TOO_LARGE, "at most 4194304"),
    "sizes that lie": (spoilt(zip_of(BOMB, compress=True), CENTRAL, 24, struct.pack("<L", 9)), INVALID, "sound zip"),
    "a wrong checksum": (spoilt(zip_of(SOUND), CENTRAL, 16, bytes(4)), INVALID, "CRC"),
    "encrypted": (spoilt(zip_of(SOUND), CENTRAL, 8, b"\1"), INVALID, "encrypted"),
    "bzip2": (spoilt(zip_of(SOUND), CENTRAL, 10, b"\14"), INVALID, "neither stored nor deflated"),
    "a directory of 4 GB": (spoilt(zip_of(SOUND), END, 12, b"\xf0\xff\xff\xff"), INVALID, "sound zip"),
    "a member out of the file": (spoilt(zip_of(SOUND), CENTRAL, 42, b"\xf0\xff\xff\x7f"), INVALID, "sound zip"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("data", "code", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_zip_is_refused_with_its_reason(room: Room, data: bytes, code: str, reason: str) -> None:
    """Each is refused by its own sentence, at once, and touches nothing outside its folder."""
    began = time.thread_time()
    with pytest.raises(ArtifactError, match=reason) as caught:
        room.unpack(data)
    assert time.thread_time() - began < 0.2
    assert caught.value.code == code
    assert len(str(caught.value)) < 500
    assert room.is_clean()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(room: Room) -> None:
    """A choice between two configs is never made silently."""
    with pytest.raises(ArtifactError, match=f"{CONFIG} twice"):
        room.unpack(zip_of([*SOUND.items(), (CONFIG, b"{}")]))


def test_nul_in_a_name_is_refused(room: Room) -> None:
    """A name that zipfile would cut at its NUL is refused by what it really was."""
    data = zip_of({**SOUND, "README.md": b"x"}).replace(b"README.md", b"READM\0.md")
    with pytest.raises(ArtifactError, match="points out"):
        room.unpack(data)


def test_a_long_name_is_not_repeated_whole(room: Room) -> None:
    """60,000 characters of a name do not come back in the answer."""
    with pytest.raises(ArtifactError) as caught:
        room.unpack(zip_of({"x" * 60_000 + ".pkl": b""}))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("data", "reason"), [(save(toy_tensors()), "carries no adapter_config"), (b"\xff" * 8 + b"{" * 9, "header")]
)
def test_a_hostile_single_file_is_refused(room: Room, data: bytes, reason: str) -> None:
    """Safetensors without its config, or unsound, are refused, and nothing is written."""
    with pytest.raises(ArtifactError, match=reason):
        room.unpack(data)
    assert list(room.into.iterdir()) == []


def test_a_full_disk_is_the_disks_error(room: Room) -> None:
    """An error of the disk is not blamed on the zip."""
    room.body.write_bytes(zip_of(SOUND))
    with pytest.raises(FileNotFoundError):
        unpack_upload(room.body, room.into / "absent", MAX_BYTES)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_spoiled_tar_is_refused_or_sound(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A tar with any bytes of its headers changed gives an `ArtifactError`, or files that are checked as any other."""
    room, sound = Room(tmp_path_factory.mktemp("room")), bytearray(gzip.decompress(tar_of(SOUND)))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, 1023))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # else nearly all fall at the first sum
        sound[148:156] = b"%06o\0 " % (sum(sound[:148]) + sum(sound[156:512]) + 8 * 32)
    try:
        read_folder(room.unpack(gzip.compress(bytes(sound), 1)))
    except ArtifactError as error:
        assert len(str(error)) < 500
    assert room.is_clean()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_spoiled_zip_is_refused_or_sound(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A zip with any bytes changed gives an `ArtifactError`, or files that are then checked as any other."""
    room, sound = Room(tmp_path_factory.mktemp("room")), bytearray(zip_of(SOUND, compress=True))
    records = [place for place in range(len(sound)) if sound[place : place + 2] == b"PK"]
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from(records)) + data.draw(st.integers(0, 60))
        sound[min(near, len(sound) - 1)] = data.draw(st.integers(0, 255))
    try:
        read_folder(room.unpack(bytes(sound)))
    except ArtifactError as error:
        assert len(str(error)) < 500
    assert room.is_clean()
