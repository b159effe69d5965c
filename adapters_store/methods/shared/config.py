"""Read a method's config key by key: no key that could change the output is ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import CONFIG

# Keys of every PEFT config that do not change a trained adapter's output.
IGNORED_KEYS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
)
# Keys of every PEFT config -> the values that are served.
SERVED_VALUES: Mapping[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM")}

T = TypeVar("T")


def read_config(
    config: Mapping[str, Any],
    schema: type[T],
    method: str,
    ignored: Collection[str] = (),
    served_values: Mapping[str, tuple[Any, ...]] | None = None,
) -> T:
    """Read the keys of `schema`, a struct, from a config of which every key is checked.

    `ignored` keys cannot change a trained adapter's output; each key of `served_values` must have one of its values. A
    value of None counts as a missing key. Raises `MethodUnsupportedError` naming a key or value that is not served, and
    `ArtifactError` for a value of the wrong type.
    """
    kept, values = {}, {**SERVED_VALUES, **(served_values or {})}
    fields = {field.encode_name for field in msgspec.structs.fields(schema)}  # type: ignore[arg-type]
    for key, value in config.items():
        if key in values:
            if value not in values[key] or (isinstance(value, int) and not isinstance(value, bool)):
                raise MethodUnsupportedError(f"{method} with {key}={str(value)[:80]} is not served", key)
        elif key in fields:
            kept[key] = value
        elif key not in IGNORED_KEYS and key not in ignored:
            raise MethodUnsupportedError(f"adapter_config.json has a key that is not known: {key[:80]}", key[:80])
    try:
        return msgspec.convert({key: value for key, value in kept.items() if value is not None}, schema)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"adapter_config.json: {error}", CONFIG) from None
