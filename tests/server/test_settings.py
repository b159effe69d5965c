"""The settings: each a flag and a variable; what cannot be meant is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.core import RunnerConfig
from server.engine.messages import EngineConfig
from server.settings import Settings, SettingsError, check_environment, is_loopback, variable

KEY = "k" * 16


def test_defaults_are_closed() -> None:
    """A server without any setting is on loopback, and asks for no key."""
    settings = Settings()
    assert (settings.host, settings.port, settings.admin_key) == ("127.0.0.1", 8000, None)


def test_defaults_of_the_engine_stand_once(tmp_path: Path) -> None:
    """An engine without any setting is configured by its own defaults; its threads alone are counted by the server."""
    settings = Settings(data=tmp_path)
    base = RunnerConfig(folder="folder", name=settings.base, num_threads=settings.num_threads)
    own = EngineConfig(runner=base, blobs=str(tmp_path / "artifacts"))
    assert settings.engine_config(Path("folder")) == own


def test_every_setting_is_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each field is read from MANYHATS_ and its name."""
    values: dict[str, tuple[str, Any]] = {
        "base": ("x", "x"),
        "data": (str(tmp_path), tmp_path),
        "store": ("s3://bucket/prefix", "s3://bucket/prefix"),
        "registry": ("postgresql://host/name", "postgresql://host/name"),
        "cuda_graphs": ("true", True),
        "cache": (str(tmp_path), tmp_path),
        "import_": (str(tmp_path), tmp_path),
        "host": ("::1", "::1"),
        "port": ("1", 1),
        "admin_key": (KEY, KEY),
        "precision": ("bf16", "bf16"),
        "device": ("cuda", "cuda"),
        "num_threads": ("3", 3),
        "kv_cache_bytes": ("2GiB", 2**31),
        "block_size": ("16", 16),
        "prefix_cache": ("false", False),
        "slot_bytes": ("1MB", 10**6),
        "host_bytes": ("5", 5),
        "max_running": ("2", 2),
        "max_waiting": ("2", 2),
        "max_batch_tokens": ("16", 16),
        "max_sequence_tokens": ("9", 9),
        "max_body_bytes": ("1KiB", 1024),
        "max_upload_bytes": ("1KiB", 1024),
        "body_timeout_s": ("0.5", 0.5),
        "keep_alive_s": ("9", 9),
        "prompt_control_tokens": ("false", False),
        "tool_format": ("hermes", "hermes"),
        "keep_audit_days": ("9", 9),
        "allowed_origins": ("https://a.example", "https://a.example"),
        "allow_load_from": ("/models,s3://bucket/a", "/models,s3://bucket/a"),
        "drain_s": ("0", 0),
        "log_level": ("debug", "debug"),
        "log_format": ("json", "json"),
    }
    assert set(values) == set(Settings.model_fields)
    for name, (text, _) in values.items():
        monkeypatch.setenv(variable(name), text)
    check_environment()
    settings = Settings()
    for name, (_, value) in values.items():
        found = getattr(settings, name)
        assert (found.get_secret_value() if name == "admin_key" else found) == value, name
    assert variable("import_") == "MANYHATS_IMPORT"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])  # noqa: S104 - it must be refused
def test_open_only_with_a_key(host: str) -> None:
    """A host that is not loopback is refused without an admin key, with a sentence that says what to do."""
    with pytest.raises(ValidationError, match=r"not loopback.*MANYHATS_ADMIN_KEY"):
        Settings(host=host)
    if host:
        assert Settings(host=host, admin_key=KEY).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback(host: str) -> None:
    """Loopback addresses, and their name, are loopback."""
    assert is_loopback(host)


def test_a_short_key_is_refused() -> None:
    """A key that could be guessed is refused, and is not in the message."""
    with pytest.raises(ValidationError, match="shorter than 16") as error:
        Settings(admin_key="guess-me")
    assert "guess-me" not in str(error.value.errors()[0]["msg"])


def test_the_key_is_never_shown() -> None:
    """The settings' text does not show the key."""
    assert KEY not in repr(Settings(admin_key=KEY))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "x"),
        ("device", "gpu"),
        ("device", "meta"),
        ("precision", "fp8"),
        ("max_running", "0"),
        ("block_size", "33"),
        ("body_timeout_s", "0"),
        ("kv_cache_bytes", "much"),
        ("prefix_cache", "perhaps"),
        ("unknown", "1"),
    ],
)
def test_wrong_values_are_refused(name: str, value: str) -> None:
    """A value that a setting cannot have, or a name that is none, is refused and named."""
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValidationError) as error:
        Settings(**wrong)
    assert error.value.errors()[0]["loc"][-1] == name


def test_an_unknown_variable_is_refused() -> None:
    """A MANYHATS_ variable that is no setting is refused with the nearest that is one; others are left alone."""
    with pytest.raises(SettingsError, match="MAX_RUNING is no setting; did you mean MANYHATS_MAX_RUNNING"):
        check_environment({"MANYHATS_MAX_RUNING": "3"})
    with pytest.raises(SettingsError, match="MANYHATS_ZZZZZ is no setting; `manyhats serve --help`"):
        check_environment({"MANYHATS_ZZZZZ": "3"})
    check_environment({"PATH": "", "MANYHATS_PORT": "1", "manyhats_x": "1"})
