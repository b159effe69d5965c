"""What the methods share: configs read key by key, tensors sorted by site, and the sites that a PEFT config names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import CONFIG

# In every PEFT config, and without effect on what a trained adapter answers.
IGNORED_KEYS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
)
# In every PEFT config, and served with these values alone.
SERVED_VALUES: Mapping[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM")}

T = TypeVar("T")


def read_config(
    config: Mapping[str, Any],
    schema: type[T],
    method: str,
    ignored: Collection[str] = (),
    served_values: Mapping[str, tuple[Any, ...]] | None = None,
) -> T:
    """The keys of `schema`, a struct, out of a config that is checked key by key.

    `ignored` keys cannot change what a trained adapter answers; of `served_values` only these values are served.
    None is as if the key were absent. Raises `MethodUnsupportedError` naming a key or a value that is not served.
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
