"""Read a method's config key by key: no key that could change the output is ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import CONFIG, Artifact

# Keys of every PEFT config that do not change a trained adapter's output.
IGNORED_KEYS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
)
# Keys of ms-swift and of PEFT before 0.3, for training alone.
OTHERS_KEYS = frozenset({"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights"})
# Keys of every PEFT config -> the values that are served.
SERVED_VALUES: Mapping[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM")}

T = TypeVar("T")


def read_config(
    artifact: Artifact,
    schema: type[T],
    method: str,
    ignored: Collection[str] = (),
    served_values: Mapping[str, tuple[Any, ...]] | None = None,
) -> T:
    """Read the keys of `schema`, a struct, from an artifact's config of which every key is checked.

    `ignored` keys cannot change a trained adapter's output; each key of `served_values` must have one of its values. A
    value of None counts as a missing key. A key that is not known, as a newer PEFT's, is passed over and added to the
    artifact's `idle_keys` if its value says that it is not used. Raises `MethodUnsupportedError` naming a key or value
    that is not served, and `ArtifactError` for a value of the wrong type.
    """
    kept, values = {}, {**SERVED_VALUES, **(served_values or {})}
    fields = {field.encode_name for field in msgspec.structs.fields(schema)}  # type: ignore[arg-type]
    for key, value in artifact.config.items():
        if key in values:
            if value not in values[key] or (isinstance(value, int) and not isinstance(value, bool)):
                raise MethodUnsupportedError(f"{method} with {key}={str(value)[:80]} is not served", key)
        elif key in fields:
            kept[key] = value
        elif key not in IGNORED_KEYS and key not in ignored:
            if key not in OTHERS_KEYS and not _is_unused(value):
                raise MethodUnsupportedError(f"adapter_config.json has a key that is not known: {key[:80]}", key[:80])
            artifact.idle_keys.add(key)
    try:
        return msgspec.convert({key: value for key, value in kept.items() if value is not None}, schema)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"adapter_config.json: {error}", CONFIG) from None


def _is_unused(value: Any) -> bool:
    """Whether a value says of its key that it is not used: null, false, or empty. A number may be a strength."""
    return value is None or value is False or value in ("", [], {})
