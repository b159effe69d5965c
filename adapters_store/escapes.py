"""Words of a stranger made safe: as a part of a URL's path, and on a terminal."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

# C0, DEL, C1, halves of surrogate pairs, and what ends lines or turns the direction of text around.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def url_path(*parts: str) -> str:
    """Join parts to the path of a URL, each quoted.

    Raises `ValueError` with a sentence for one that would be another path for a server, which reads the path unquoted.
    """
    for part in parts:
        if part in ("", ".", "..") or "/" in part:
            raise ValueError(f"'{part}' cannot be meant: a name is not empty, is not dots alone, and has no slash")
    return "".join(f"/{quote(part, safe='', errors='surrogateescape')}" for part in parts)


def printable(text: str, kept: str = "") -> str:
    """Return a text in which what a terminal would obey is written as Python writes it: `\\x1b`.

    Characters in `kept` stay.
    """
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in kept else ascii(match[0])[1:-1], text)


def json_line(value: object) -> str:
    """Write a value as one line of JSON that no terminal obeys."""
    return json.dumps(value).replace("\x7f", "\\u007f")
