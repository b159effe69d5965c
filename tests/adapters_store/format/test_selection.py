"""The folder that a trainer leaves: the adapter in it is found, only its files are opened, and the others are told."""

from __future__ import annotations

import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import ArtifactError, ArtifactTypeError, MethodUnsupportedError
from adapters_store.format.archive import unpack_upload
from adapters_store.format.folder import CONFIG, REFUSED, WEIGHTS, read_folder
from adapters_store.format.selection import describe_ignored, find_ignored
from tests.kit.forge import sound_members, tar_link, tar_of, toy_folder, zip_of

SOUND = sound_members()
OTHER = {CONFIG: b"not even JSON", WEIGHTS: b"nor safetensors"}
EVIL = pickle.dumps({"lr": 1e-3})
CLUTTER = {  # by what a trainer, its callbacks, an editor or an archiver leaves; none of it is sound
    "training_args.bin": EVIL,
    "optimizer.pt": EVIL,
    "scheduler.pt": b"",
    "rng_state.pth": EVIL,
    "scaler.ckpt": b"x",
    "trainer_state.json": b"{",
    "README.md": b"# a model",
    "tokenizer.json": b"{",
    "chat_template.jinja": b"{{ evil }}",
    "tokenizer.model": b"x",
    "pytorch_model_fsdp.bin": EVIL,
    "global_step9/mp_rank_00_model_states.pt": EVIL,
    "runs/Nov30_08:19:41_host/events.out.tfevents.1": b"x",
    "wandb/latest-run/files/config.yaml": b"x",
    "code.zip": zip_of({"x": b""}),
    "config.json": b"{}",
    "__MACOSX/._" + CONFIG: b"\0\5",
    "._" + WEIGHTS: b"\0\5",
    ".DS_Store": b"",
}
Pack = Callable[[dict[str, bytes]], bytes]


def backslashed(members: dict[str, bytes]) -> bytes:
    """A zip as old Windows tools write it."""
    return zip_of({name.replace("/", "\\"): data for name, data in members.items()})


def dotted(members: dict[str, bytes]) -> bytes:
    """A tar of `.`."""
    return tar_of({f"./{name}": data for name, data in members.items()})


PACKS: dict[str, Pack] = {"zip": zip_of, "backslashes": backslashed, "tar": tar_of, "tar of .": dotted}


def unpacked(room: Path, body: bytes) -> tuple[Path, list[str]]:
    """The folder that an upload becomes, and what was ignored."""
    (room / "body").write_bytes(body)
    (room / "folder").mkdir()
    ignored = unpack_upload(room / "body", room / "folder", 2**22)
    return room / "folder", ignored


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_adapter_is_found_in_any_clutter(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """At any depth, among any files and checkpoints of any step, in any packing: its bytes, and all others told."""
    place = data.draw(st.sampled_from(["", "out/", "home/me/runs/lora/final/", "checkpoint-7/", "checkpoint-7/hat/"]))
    clutter = data.draw(st.lists(st.sampled_from(sorted(CLUTTER)), unique=True))
    depths = data.draw(
        st.lists(st.sampled_from(["checkpoint-5/", "checkpoint-best/", "a/b/", "old/copy/"]), unique=True)
    )
    members = {f"{place}{name}": body for name, body in SOUND.items()}
    members |= {f"{place}{name}": CLUTTER[name] for name in clutter}
    members |= {f"{place}{depth}{name}": body for depth in depths for name, body in OTHER.items()}
    names = data.draw(st.permutations(sorted(members)))
    pack = data.draw(st.sampled_from(sorted(PACKS)))
    folder, ignored = unpacked(tmp_path_factory.mktemp("room"), PACKS[pack]({name: members[name] for name in names}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == SOUND
    assert set(ignored) == set(members) - {f"{place}{name}" for name in SOUND}


@pytest.mark.parametrize("pack", PACKS)
def test_a_final_adapter_is_taken_before_its_checkpoints(tmp_path: Path, pack: str) -> None:
    """Beside checkpoints on the same level, or deeper than they are, the one in none of them is meant."""
    members = {f"run/{step}/{name}": body for step in ("checkpoint-5", "Checkpoint-10") for name, body in OTHER.items()}
    folder, _ = unpacked(tmp_path, PACKS[pack]({**members, **{f"run/a/b/{name}": SOUND[name] for name in SOUND}}))
    assert read_folder(folder).config


@pytest.mark.parametrize("where", ["", "out/"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_adapter.bin", "adapter_model.pt", "adapter.pth"])
def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, where: str, name: str) -> None:
    """If the weights beside the config are a pickle alone, no safetensors of a checkpoint stand in for them."""
    members = {f"{where}{CONFIG}": SOUND[CONFIG], f"{where}{name}": EVIL}
    members |= {f"{where}checkpoint-5/{part}": SOUND[part] for part in SOUND}
    with pytest.raises(ArtifactTypeError, match="are a pickle") as caught:
        unpacked(tmp_path, zip_of(members))
    assert caught.value.param == name


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    """Weights that were saved in both forms are read in the safe one."""
    _, ignored = unpacked(tmp_path, zip_of({**SOUND, "adapter_model.bin": EVIL}))
    assert ignored == ["adapter_model.bin"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_answer_is_refused_where_it_counts(tmp_path: Path, name: str) -> None:
    """A file beside the adapter that changes the answer is refused; one of a checkpoint is none of it."""
    with pytest.raises(MethodUnsupportedError, match=name):
        unpacked(tmp_path, zip_of({**SOUND, name: b"x"}))
    (tmp_path / "folder").rmdir()
    _, ignored = unpacked(tmp_path, zip_of({**SOUND, f"checkpoint-5/{name}": b"x"}))
    assert ignored == [f"checkpoint-5/{name}"]


def test_what_is_not_read_may_be_anything(tmp_path: Path) -> None:
    """Links, devices and odd compressions that are no part of the adapter are ignored, and never made."""
    link = zipfile.ZipInfo("latest")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    body = bytearray(zip_of([*SOUND.items(), (link, b"/etc/passwd"), ("optimizer.pt", EVIL)]))
    body[body.rindex(b"PK\1\2") + 10] = 14  # LZMA
    _, ignored = unpacked(tmp_path, bytes(body))
    assert ignored == ["latest", "optimizer.pt"]
    for path in (tmp_path / "folder").iterdir():
        path.unlink()
    (tmp_path / "folder").rmdir()
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    links = [(tar_link(f"l{kind!r}", kind), b"") for kind in kinds]
    folder, ignored = unpacked(tmp_path, tar_of([*SOUND.items(), *links]))
    assert len(ignored) == 4 and {path.name for path in folder.iterdir()} == set(SOUND)


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path: Path) -> None:
    """A base's own folder is no adapter's, and the sentence names the file that an adapter has."""
    with pytest.raises(ArtifactError, match=f"no {CONFIG}"):
        unpacked(tmp_path, zip_of({"config.json": b"{}", "model.safetensors": b""}))


def test_a_tokenizer_and_a_template_are_told_first() -> None:
    """Whatever is not used is told: tokenizers and templates by name, however many other files there are."""
    names = [f"runs/{number}" for number in range(50)] + ["out/tokenizer.json", "out/chat_template.jinja"]
    told = describe_ignored(names)
    assert "are used, not chat_template.jinja, tokenizer.json" in told and "runs/0" in told and "42 more" in told
    assert len(describe_ignored(["x" * 10_000, "tokenizer" * 1000])) < 500
    assert describe_ignored([]) == ""


def test_what_a_folder_holds_beside_the_adapter(tmp_path: Path) -> None:
    """Of a folder on the disk the same is told as of an upload."""
    folder = toy_folder(tmp_path / "hat")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    assert find_ignored(folder) == ["checkpoint-5/", "tokenizer_config.json"]
