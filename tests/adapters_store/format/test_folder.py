"""The artifact on disk: what is read, what its digest covers, what is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from adapters_store.errors import ArtifactError
from adapters_store.format import folder
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, read_folder, read_manifest, write_folder
from adapters_store.format.manifest import Around, GenerationDefaults, ParityCase, PromptFormat, TaskForm
from tests.kit.adapters import make_lora
from tests.kit.forge import digest_of, toy_config, toy_folder, toy_manifest, toy_tensors

ROLES = PromptFormat(
    begin="<s>", system=Around("S:", "\n"), user=Around("U:", "\n"), assistant=Around("A:", "\n"), generation="A:"
)
FULL = {
    "prompt_format": ROLES,
    "ends": [2, 7],
    "generation": GenerationDefaults(temperature=0.0, stop_token_ids=(3,)),
    "form": TaskForm(labels=("yes", "no")),
    "parity": [ParityCase([1, 2, 3], [(7, 1.5), (8, -2.0)], [7, 7])],
    "training": {"steps": 100, "data": {"rows": 3}},
    "evaluation": {"before": {"exact_match": 0.0}, "after": {"exact_match": 0.9}},
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Config, tensors and manifest come back as they were; the sizes add up."""
    folder = toy_folder(tmp_path / "hat", seed=3, manifest=toy_manifest(**FULL))
    read = read_folder(folder)
    assert read.config == toy_config()
    assert read.manifest == toy_manifest(**FULL)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in toy_tensors(3).items())
    assert read.num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_peft_opens_what_is_written(tmp_path: Path, tiny_base: Path) -> None:
    """`PeftModel.from_pretrained` takes a folder of ours, manifest and all, and finds every tensor in it."""
    from_peft = read_folder(make_lora(tmp_path / "peft", tiny_base, seed=1))
    write_folder(tmp_path / "ours", from_peft.config, save(from_peft.tensors), toy_manifest(**FULL))
    with warnings.catch_warnings():  # PEFT warns of missing keys; let that be an error, but not what it warns of itself
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "ours")
    state = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert state.keys() == from_peft.tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in from_peft.tensors.items())


def test_old_folder_is_lost_at_no_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is written over is whole on disk, under its name or aside, until the new one has its place."""
    digest = digest_of(toy_folder(tmp_path / "hat", seed=1))
    rename, moments = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        moments.append({digest_of(path) for path in tmp_path.iterdir() if path.is_dir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    new = digest_of(toy_folder(tmp_path / "hat", seed=2))
    assert moments and all(digest in moment for moment in moments)
    assert [digest_of(path) for path in tmp_path.iterdir()] == [new]


def test_digest_is_the_content_of_the_three_files(tmp_path: Path) -> None:
    """Each of the three files changes the digest; a file beside them and the folder's name do not."""
    digest = digest_of(toy_folder(tmp_path / "a"))
    assert len(digest) == 64
    assert digest_of(toy_folder(tmp_path / "b")) == digest
    (tmp_path / "b" / "README.md").write_text("hello")
    assert digest_of(tmp_path / "b") == digest
    others = [
        digest_of(toy_folder(tmp_path / "c", seed=1)),
        digest_of(toy_folder(tmp_path / "d", lora_alpha=5)),
        digest_of(toy_folder(tmp_path / "e", manifest=toy_manifest())),
    ]
    assert len({digest, *others}) == 4


def test_digest_is_the_one_that_others_compute() -> None:
    """sha256 over each file's name, its length before it, and the sha256 of its bytes, in the order of the names."""
    told = "a08f647a8885cf7291ddd2187f289c27f187cd3b1050555c66107cb4372ade34"
    assert folder.digest_of({"b": b"two", "a": b"one"}) == told
    assert folder.digest_of({"a": b"two", "b": b"one"}) != told


def test_digest_is_framed() -> None:
    """Another split of the same names and bytes into files has another digest."""
    splits: list[dict[str, bytes]] = [{"a": b"bc"}, {"ab": b"c"}, {"a": b"b", "c": b""}, {"a": b"", "b": b"c"}, {}]
    assert len({folder.digest_of(files) for files in splits}) == len(splits)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    """A folder without its config or its weights is no artifact."""
    folder = toy_folder(tmp_path / "hat")
    (folder / missing).unlink()
    with pytest.raises(ArtifactError, match=f"there is no {missing}"):
        read_folder(folder)


def test_weights_saved_as_a_pickle_say_how_to_save_them(tmp_path: Path) -> None:
    """Where only adapter_model.bin is there, the sentence says safe_serialization=True."""
    folder = toy_folder(tmp_path / "hat")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="safe_serialization=True"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("[]", "artifact_invalid", "not a JSON object"),
        ('{"r": 1, "r": 2}', "artifact_invalid", "'r' appears twice"),
        ('{"r": NaN}', "artifact_invalid", "NaN"),
        ('{"r": ' + "1" * 5000 + "}", "artifact_invalid", "digits"),
        ('{"r": ' + "[" * 100_000, "artifact_invalid", "nested deeper"),
        ('{"r": "' + "x" * 2**18 + '"}', "artifact_too_large", "at most 262144"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path: Path, text: str, code: str, reason: str) -> None:
    """A config that is not plain bounded JSON is refused, naming the file."""
    folder = toy_folder(tmp_path / "hat")
    (folder / CONFIG).write_text(text)
    with pytest.raises(ArtifactError, match=reason) as caught:
        read_folder(folder)
    assert (caught.value.code, caught.value.param) == (code, CONFIG)


BASE = {"name": "toy", "identity": "a" * 64, "weights": "b" * 64}
SOUND = {"format_version": 1, "method": "lora", "base": BASE}
CASE = {"prompt_token_ids": [1], "top": [[1, 0.5]], "continuation": [1]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "format_version 2, not 1"),
        ({"format_version": "1"}, "format_version"),
        ({"method": ""}, "method"),
        ({"method": 1}, "method"),
        ({"method": "x" * 201}, "method"),
        ({"template": "{{ x }}"}, "template"),
        ({"base": {**BASE, "identity": "A" * 64}}, "base.identity"),
        ({"base": {**BASE, "weights": "../x"}}, "base.weights"),
        ({"base": {"name": "toy"}}, "identity"),
        ({"prompt_format": {"user": {"before": "U:", "jinja": "x"}}}, "jinja"),
        ({"generation": {"temperature": -1}}, "generation.temperature"),
        ({"generation": {"heat": 1}}, "heat"),
        ({"form": {}}, "either labels or a schema"),
        ({"form": {"labels": ["a"], "schema": {}}}, "either labels or a schema"),
        ({"form": {"labels": []}}, "form.labels"),
        ({"form": {"labels": ["a", ""]}}, "form.labels"),
        ({"form": {"labels": ["a", "b", "a"]}}, "each label once"),
        ({"form": {"schema": "x"}}, "form.schema"),
        ({"form": {"regex": "a"}}, "regex"),
        ({"prompt_format": {"user": "U:"}}, "prompt_format.user"),
        ({"prompt_format": {"begin": "x" * 5000}}, "prompt_format is longer"),
        ({"parity": [{**CASE, "prompt_token_ids": []}]}, "prompt_token_ids"),
        ({"parity": [{**CASE, "prompt_token_ids": [-1]}]}, "prompt_token_ids"),
        ({"parity": [{**CASE, "prompt_token_ids": [2**31]}]}, "prompt_token_ids"),
        ({"parity": [{**CASE, "prompt_token_ids": [1.5]}]}, "prompt_token_ids"),
        ({"parity": [{**CASE, "prompt_token_ids": [True]}]}, "prompt_token_ids"),
        ({"parity": [{**CASE, "top": [[1]]}]}, "top"),
        ({"parity": [{**CASE, "continuation": [1] * 257}]}, "continuation"),
        ({"parity": [CASE] * 65}, "parity"),
        ({"training": []}, "training"),
    ],
)
def test_an_unsound_manifest_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Types, sizes and unknown fields of a manifest are checked, and the sentence names the place."""
    assert read_manifest(msgspec.json.encode(SOUND)).method == "lora"
    with pytest.raises(ArtifactError, match=reason):
        read_manifest(msgspec.json.encode({**SOUND, **changes}))


def test_a_parity_logit_is_finite() -> None:
    """NaN is no logit."""
    text = json.dumps({**SOUND, "parity": [{**CASE, "top": [[1, float("nan")]]}]})
    with pytest.raises(ArtifactError, match="NaN"):
        read_manifest(text.encode())


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    """A manifest beyond its cap is refused by its size alone."""
    folder = toy_folder(tmp_path / "hat")
    (folder / MANIFEST).write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ArtifactError, match="at most 1048576") as caught:
        read_folder(folder)
    assert caught.value.code == "artifact_too_large"


def test_prompt_format_is_plain_text_around_each_role() -> None:
    """Turns render in order, each in its role's text, then the call for an answer; braces are only braces."""
    parts = ROLES.parts([("system", "{{ 7 * 7 }}"), ("user", "hi"), ("assistant", "yo")])
    rendered = "".join(text for text, _ in parts)
    assert rendered == "<s>S:{{ 7 * 7 }}\nU:hi\nA:yo\nA:"


def test_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old folder as it was, and nothing beside it."""
    folder = toy_folder(tmp_path / "hat", seed=1)
    before = digest_of(folder)

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapters_store.format.folder.sync_folder", full_disk)
    with pytest.raises(OSError, match="No space"):
        toy_folder(folder, seed=2)
    assert digest_of(folder) == before
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.undo()
    assert digest_of(toy_folder(folder, seed=2)) != before
    assert list(tmp_path.iterdir()) == [folder]
