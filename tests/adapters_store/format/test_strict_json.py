"""JSON from untrusted uploads: what is refused, with which message."""

from __future__ import annotations

import time

import pytest

from adapters_store.format.strict_json import MAX_DEPTH, StrictJSONError, loads

UNSOUND = {
    "duplicate key": (b'{"r": 1, "r": 2}', "appears twice"),
    "duplicate key inside": (b'[{"a": {"r": 1, "r": 2}}]', "appears twice"),
    "NaN": (b'{"r": NaN}', "NaN"),
    "infinity": (b'{"r": -Infinity}', "-Infinity"),
    "overflow": (b'{"r": 1e999}', "does not fit"),
    "5,000 digits": (b"[" + b"1" * 5000 + b"]", "digits"),
    "21 negative digits": (b"[-" + b"1" * 21 + b"]", "digits"),
    "NUL": (rb'["a\u0000b"]', "NUL"),
    "half a surrogate pair": (rb'["\ud83c"]', "surrogate"),
    "half a pair in a key": (rb'{"\udfa9": 1}', "surrogate"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "not UTF-8": (b'["\xff"]', "not UTF-8"),
    "one thing after another": (b"{} {}", "Extra data"),
    "nothing": (b"", "Expecting value"),
    "depth 65": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deeper"),
    "depth 100,000": (b"[" * 100_000 + b"]" * 100_000, "deeper"),
    "open depth": (b'{"a":' * 50_000, "deeper"),
}


@pytest.mark.parametrize(("data", "reason"), UNSOUND.values(), ids=UNSOUND)
def test_unsound_json_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    """JSON that is not plain and bounded is refused quickly, and the message says why."""
    began = time.thread_time()
    with pytest.raises(StrictJSONError, match=reason):
        loads(data)
    assert time.thread_time() - began < 0.2


def test_sound_json_is_what_it_says() -> None:
    """Whole emoji, 20 digits, floats and 64 levels come through unchanged."""
    assert loads('{"a": ["🎩", 12345678901234567890, -1.5, null, true]}') == {
        "a": ["🎩", 12345678901234567890, -1.5, None, True]
    }
    assert loads("[-12345678901234567890]") == [-12345678901234567890]
    assert loads(rb'["\ud83c\udfa9"]') == ["🎩"]
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
