"""Parse untrusted JSON: bounded, without duplicate keys, NaN, infinities, NUL or lone surrogates."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
MAX_DIGITS = 20  # 64 bits; converting thousands of digits is slow
HOLDERS = (str, list, dict)
UNSOUND = re.compile("[\0\ud800-\udfff]")


class StrictJSONError(ValueError):
    """The text is not JSON of the accepted kind; the message says why."""


def loads(data: bytes | str) -> Any:
    """Parse UTF-8 JSON. Raises `StrictJSONError`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise StrictJSONError("it begins with a byte order mark: send UTF-8 without one")
        thing = json.loads(
            text, object_pairs_hook=unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise StrictJSONError(f"it is nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError as error:
        raise StrictJSONError(f"it is not UTF-8 (byte {error.start})") from None
    except StrictJSONError:
        raise
    except ValueError as error:  # JSONDecodeError
        raise StrictJSONError(str(error)) from None
    _check(thing, 0)
    return thing


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, for `json.loads`. Raises `StrictJSONError` if a key appears twice."""
    thing: dict[str, Any] = {}
    for key, value in pairs:
        if key in thing:
            raise StrictJSONError(f"the key {key[:100]!r} appears twice")
        thing[key] = value
    return thing


def _no_constant(name: str) -> NoReturn:
    raise StrictJSONError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJSONError(f"{text[:40]} does not fit a double")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise StrictJSONError(f"an integer has more than {MAX_DIGITS} digits")
    return int(text)


def _check(thing: Any, depth: int) -> None:
    """Check strings and nesting; `depth` counts the lists and objects around `thing`."""
    if isinstance(thing, str):
        if UNSOUND.search(thing):
            raise StrictJSONError("a string holds NUL or half of a surrogate pair")
        return
    if not isinstance(thing, dict | list):
        return
    if depth == MAX_DEPTH:
        raise StrictJSONError(f"it is nested deeper than {MAX_DEPTH}")
    for part in (*thing, *thing.values()) if isinstance(thing, dict) else thing:
        if type(part) in HOLDERS:  # most are numbers
            _check(part, depth + 1)
