"""What is cached goes where it is said, or to a folder of the user's alone with a word; nothing fails for a home."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapters_store.base import cache, resolve
from adapters_store.base.cache import CacheFolder, default_cache, writable
from adapters_store.base.identity import BaseUnavailableError
from adapters_store.base.resolve import SMOLLM2, SMOLLM2_FOLDER, hub_cache, resolve_base
from server.model.backends.kernel_cache import digest, find_cache

NOWHERE = "/proc/manyhats"  # no user, root neither, can make it


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a temporary folder of the test's own, and no setting."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv(cache.VARIABLE, raising=False)


def test_one_setting_is_for_all_that_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases, those of the hub and compiled kernels go below the folder that is named; the hub's own is left alone."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "chosen"))
    assert default_cache() == tmp_path / "chosen"
    assert find_cache().folder == tmp_path / "chosen" / "kernels" / digest()
    assert hub_cache(default_cache()) == tmp_path / "chosen" / "hub"
    assert writable(default_cache(), "bases") == CacheFolder(tmp_path / "chosen" / "bases")


@pytest.mark.parametrize("home", [NOWHERE, None])
def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """Without a home all goes to a folder of the user's alone; the base's folder is named to whoever starts."""
    monkeypatch.setattr(Path, "home", lambda: Path(home) if home else no_home())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", NOWHERE)
    spare, lines = tmp_path / "tmp" / f"manyhats-{os.getuid()}", list[str]()
    (spare / "bases" / SMOLLM2_FOLDER).mkdir(parents=True)
    spare.chmod(0o700)
    assert resolve_base(SMOLLM2, progress=lines.append) == spare / "bases" / SMOLLM2_FOLDER
    assert find_cache().folder == spare / "kernels" / digest()
    assert hub_cache(default_cache()) == spare / "hub"
    assert home is None or ("cannot be written: the base is kept in" in lines[0] and str(spare) in lines[0])


def no_home() -> Path:
    """What Python does for a user that the system does not know."""
    raise RuntimeError("Could not determine home directory.")


def test_nowhere_to_write_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the temporary folder cannot be written either, the sentence names the flag."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: NOWHERE)
    with pytest.raises(BaseUnavailableError, match=f"{NOWHERE}/bases cannot be written.*--cache"):
        resolve_base(SMOLLM2, Path(NOWHERE))


def test_a_base_is_read_from_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on a read-only disk that has the base is used as it is, without a word."""
    (tmp_path / "bases" / SMOLLM2_FOLDER).mkdir(parents=True)
    monkeypatch.setattr(resolve, "writable", lambda *_: pytest.fail("nothing is written"))
    assert resolve_base(SMOLLM2, tmp_path, pytest.fail) == tmp_path / "bases" / SMOLLM2_FOLDER


@pytest.mark.parametrize("is_anywhere", [True, False])
def test_kernels_load_without_a_home(tmp_path: Path, is_anywhere: bool) -> None:
    """A process without a home, or in whose temporary folder another has ours, has kernels' cache for itself."""
    spare = tmp_path / f"manyhats-{os.getuid()}"
    if not is_anywhere:
        spare.write_text("another's")
    code = "import numba, server.model.backends.cpu; print(numba.config.CACHE_DIR)"
    environment = {"HOME": NOWHERE, "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(spare if is_anywhere else tmp_path) and folder.exists() == is_anywhere
