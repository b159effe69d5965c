"""The settings: every field is a flag of `manyhats serve` and a variable MANYHATS_<NAME>; read here alone."""

from __future__ import annotations

import difflib
import ipaddress
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters_store.base.cache import default_cache
from adapters_store.base.resolve import SMOLLM2
from adapters_store.cores import num_cores
from adapters_store.format.manifest import ToolFormatName
from server.core import RunnerConfig
from server.engine.messages import EngineConfig

PREFIX = "MANYHATS_"


class SettingsError(Exception):
    """A setting that cannot be meant; the sentence says which and what to do."""


def _default(config: type[msgspec.Struct], name: str) -> Any:
    """The default of a field of the engine's configuration: it is written there alone."""
    return next(field.default for field in msgspec.structs.fields(config) if field.name == name)


class Settings(BaseSettings):
    """Settings of `manyhats serve`. Sizes take units: 512MiB, 2GiB."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", validate_default=True, validate_by_name=True)

    base: str = Field(SMOLLM2, description="the base: smollm2-135m, a Hugging Face folder, or a hub id")
    data: Path = Field(Path("var"), description="folder of artifacts and registry")
    store: str | None = Field(
        None, description="folder or fsspec URL of artifacts (s3://bucket/prefix); DATA/artifacts if not given"
    )
    registry: str | None = Field(
        None, description="database URL of the registry (postgresql://…); SQLite in DATA if not given"
    )
    cache: Path = Field(default_factory=default_cache, description="folder of bases and compiled kernels")
    import_: Path | None = Field(
        None,
        validation_alias="MANYHATS_IMPORT",
        description="folder of folders to take in at start, a task each: the adapter in it, at any depth",
    )
    host: str = Field("127.0.0.1", description="address to bind; other than loopback only with an admin key")
    port: int = Field(8000, ge=0, le=65535, description="port to bind")
    admin_key: SecretStr | None = Field(None, description="when set, every route but health asks for a key")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        _default(RunnerConfig, "precision"), description="of the base's weights"
    )
    device: str = Field(
        _default(RunnerConfig, "device"),
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="where the base lives: cpu, cuda (not run on a GPU yet)",
    )
    cuda_graphs: bool = Field(
        _default(RunnerConfig, "cuda_graphs"),
        description="replay decode steps without an active adapter as CUDA graphs (not run on a GPU yet)",
    )
    num_threads: int = Field(default_factory=num_cores, ge=1, description="threads of the engine")
    kv_cache_bytes: ByteSize = Field(ByteSize(_default(RunnerConfig, "kv_cache_bytes")), description="for the KV cache")
    block_size: int = Field(
        _default(RunnerConfig, "block_size"), ge=4, le=256, multiple_of=4, description="positions a KV block"
    )
    prefix_cache: bool = Field(
        _default(EngineConfig, "is_prefix_cached"),
        description="share the KV of equal beginnings, within tenant and adapter",
    )
    slot_bytes: ByteSize = Field(
        ByteSize(_default(EngineConfig, "slot_bytes")), description="for adapters on the device"
    )
    host_bytes: ByteSize = Field(
        ByteSize(_default(EngineConfig, "host_bytes")), description="for adapters in host memory"
    )
    max_running: int = Field(_default(EngineConfig, "max_running"), ge=1, description="most sequences in the batch")
    max_waiting: int = Field(
        _default(EngineConfig, "max_waiting"),
        ge=1,
        description="most sequences in the queue, more are refused with 503; and most requests of a tenant that wait "
        "to be prepared",
    )
    max_batch_tokens: int = Field(_default(EngineConfig, "max_batch_tokens"), ge=16, description="most tokens a step")
    max_sequence_tokens: int | None = Field(
        _default(RunnerConfig, "max_sequence_tokens"), ge=1, description="most tokens a sequence, prompt and answer"
    )
    prompt_control_tokens: bool = Field(
        True, description="read the names of control tokens in a raw prompt as tokens; off: as text, as in messages"
    )
    tool_format: ToolFormatName | None = Field(
        None,
        description="format in which the base calls tools, if its chat template does not show it: hermes, qwen3_coder, "
        "llama3, mistral, mistral_v11, pythonic, json; a template that takes no tools gets them in this format",
    )
    max_body_bytes: ByteSize = Field(ByteSize(4 * 2**20), description="largest JSON body")
    max_upload_bytes: ByteSize = Field(ByteSize(512 * 2**20), description="largest artifact, packed and unpacked")
    body_timeout_s: float = Field(30.0, gt=0, description="most seconds between two parts of a body")
    keep_alive_s: int = Field(120, ge=1, description="seconds that a connection is kept open between requests")
    allowed_origins: str = Field(
        "", description="origins whose web pages may ask, with commas between (https://a.example,https://b.example)"
    )
    allow_load_from: str = Field(
        "",
        description="folders and URLs (s3://bucket/prefix), with commas between, from below which "
        "`POST /v1/load_lora_adapter` may load; off if not given",
    )
    keep_audit_days: int = Field(
        365, ge=1, description="days that the log of changes (`GET /audit`) and the usage of what was deleted are kept"
    )
    drain_s: int = Field(30, ge=0, description="seconds that running requests get at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        _default(EngineConfig, "log_level"), description="of the log"
    )
    log_format: Literal["auto", "json", "pretty"] = Field(
        _default(EngineConfig, "log_format"),
        description="of the log: JSON lines, pretty for a person, or auto: pretty at a terminal, JSON elsewhere",
    )

    @model_validator(mode="after")
    def _is_open_only_with_a_key(self) -> Settings:
        if self.admin_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is not loopback: anyone who reaches it could use the server. "
                f"Set {PREFIX}ADMIN_KEY, or bind to 127.0.0.1"
            )
        if self.admin_key is not None and len(self.admin_key.get_secret_value()) < 16:
            raise ValueError(f"{PREFIX}ADMIN_KEY is shorter than 16 characters")
        return self

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, given: str) -> str:
        for origin in given.split(",") if given else ():
            parts = urlsplit(origin)
            if origin != f"{parts.scheme}://{parts.netloc}" or not parts.scheme or not parts.netloc:
                raise ValueError(f"{origin!r} is no origin: write scheme, host and port alone, as https://a.example")
        return given

    @field_validator("allow_load_from")
    @classmethod
    def _are_places(cls, given: str) -> str:
        for place in given.split(",") if given else ():
            scheme, separator, rest = place.partition("://")
            is_url = bool(separator and rest) and scheme not in ("file", "local") and "::" not in place
            if not is_url and (separator or not Path(place).is_absolute()):
                raise ValueError(
                    f"{place!r} is no place to load from: write an absolute path, or a URL as s3://bucket/prefix"
                )
        return given

    @property
    def load_places(self) -> list[str]:
        """The places from which adapters may be loaded by name."""
        return self.allow_load_from.split(",") if self.allow_load_from else []

    @property
    def origins(self) -> list[str]:
        """The origins whose web pages may ask."""
        return self.allowed_origins.split(",") if self.allowed_origins else []

    def engine_config(self, base_folder: Path) -> EngineConfig:
        """The engine's configuration: every setting that a field of `EngineConfig` or `RunnerConfig` is named after."""
        values = self.model_dump()
        base = {"folder": str(base_folder), "name": self.base}
        engine = {"blobs": str(self.data / "artifacts"), "is_prefix_cached": self.prefix_cache}
        runner = msgspec.convert(values | base, RunnerConfig)
        return msgspec.convert(values | engine | {"runner": runner}, EngineConfig)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def engine_environment() -> dict[str, str]:
    """The environment of the engine and its loaders: without the admin key and what opens the registry's database.

    Of the settings they need only the folder where kernels are kept.
    """
    kept, secret = variable("cache"), (PREFIX, "PG")
    return {name: value for name, value in os.environ.items() if name == kept or not name.startswith(secret)}


def check_environment(environment: dict[str, str] | None = None) -> None:
    """Raise `SettingsError` for a MANYHATS_ variable that no setting has; it would be ignored in silence otherwise."""
    known = [variable(name).removeprefix(PREFIX) for name in Settings.model_fields] + ["API_KEY"]  # of the commands
    for name in os.environ if environment is None else environment:
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
            near = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else "`manyhats serve --help` lists them"
            raise SettingsError(f"{name} is no setting; {hint}")


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.rstrip("_").upper()


def flags_of(name: str, field: FieldInfo) -> list[str]:
    """The flags of `manyhats serve` that set a field: what can be on or off has one for each."""
    word = name.rstrip("_").replace("_", "-")
    return [f"--{word}", f"--no-{word}"] if field.annotation is bool else [f"--{word}"]
