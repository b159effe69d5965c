"""A form with one file is that file, however it comes; any other form is refused with what to send."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.api.form_file import MAX_HEAD_BYTES, file_parts
from server.errors import BadRequestError

pytestmark = pytest.mark.anyio
BOUNDARY = "b0undary"


def form(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    """A form of parts, each with its Content-Disposition."""
    encoded = [f"--{BOUNDARY}\r\nContent-Disposition: {head}\r\n\r\n".encode() + body + b"\r\n" for head, body in parts]
    return b"".join(encoded) + f"--{BOUNDARY}".encode() + end


async def read(body: bytes, sizes: list[int], boundary: str = BOUNDARY) -> bytes:
    """The file of a form that comes in parts of these sizes, again and again."""

    async def parts() -> AsyncIterator[bytes]:
        at, turn = 0, 0
        while at < len(body):
            size = sizes[turn % len(sizes)]
            yield body[at : at + size]
            at, turn = at + size, turn + 1

    return b"".join([part async for part in file_parts(parts(), boundary)])


FILE = 'form-data; name="file"; filename="hat.zip"'
NEARLY = [b"", b"\r\n", b"--", b"\r\n--", b"\r\n--b0undar", b"--b0undary", b"\r\n\r\n", b"PK\0\r"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(NEARLY), max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=3))
async def test_any_bytes_in_parts_of_any_size(anyio_backend: str, pieces: list[bytes], sizes: list[int]) -> None:
    """Bytes that nearly are a boundary, cut anywhere, come out as they are."""
    data = b"".join(pieces)
    assume(f"\r\n--{BOUNDARY}".encode() not in data)
    assert await read(form((FILE, data)), sizes) == data


async def test_what_httpx_sends(anyio_backend: str) -> None:
    """A client's own form is read."""
    request = httpx2.Request("POST", "http://x", files={"adapter": ("a b.zip", b"PK" * 100)})
    boundary = request.headers["content-type"].partition("boundary=")[2]
    assert await read(request.read(), [7], boundary) == b"PK" * 100


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (form(('form-data; name="task"', b"a"), (FILE, b"x")), "does not begin with a file"),
        (form((FILE, b"x"), ('form-data; name="task"', b"a")), "more than a file"),
        (form((FILE, b"x"), (FILE, b"y")), "more than a file"),
        (form((FILE, b"x"))[:-6], "ends within its file"),
        (form(), "does not begin with a file"),
        (b"", "ends within its file"),
        (form((FILE, b"x"))[:40], "ends within its file"),
        (b"PK\3\4\r\n\r\n" + b"x" * 100, "does not begin with a file"),
        (form((FILE + "x" * MAX_HEAD_BYTES, b""))[:-30], "does not begin with a file"),
    ],
)
async def test_other_forms_are_refused(anyio_backend: str, body: bytes, says: str) -> None:
    """A form of fields, of several files, or cut off is refused by a sentence."""
    for size in (1, 10**6):
        with pytest.raises(BadRequestError, match=says):
            await read(body, [size])
