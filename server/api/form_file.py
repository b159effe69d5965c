"""Read the file out of a form (multipart/form-data) as it comes, as `curl -F` and browsers send one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from email.parser import BytesHeaderParser

from server.errors import BadRequestError

FORM_TYPE = "multipart/form-data"
MAX_HEAD_BYTES = 16 * 2**10  # of a part: its name and type
ONE_FILE = "send a form with the file alone: task, activate and note belong into the URL"


async def file_parts(parts: AsyncIterator[bytes], boundary: str) -> AsyncIterator[bytes]:
    """The bytes of a form's only file. Raises `BadRequestError` if it is anything else, and the errors of `parts`."""
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    buffer, is_inside, tail = bytearray(b"\r\n"), False, b""
    async for part in parts:
        if tail:
            continue  # behind the end may be anything
        buffer += part
        if not is_inside:
            is_inside = _took_head(buffer, delimiter)
        if is_inside:
            end = buffer.find(delimiter)
            if end >= 0 and len(buffer) < end + len(delimiter) + 2:
                continue  # whether another part follows is told by the two bytes to come
            tail = bytes(buffer[end + len(delimiter) :][:2]) if end >= 0 else b""
            size = end if end >= 0 else max(0, len(buffer) - len(delimiter))
            yield bytes(buffer[:size])
            del buffer[:size]
    if tail != b"--":
        raise BadRequestError(f"the form has more than a file; {ONE_FILE}" if tail else "the form ends within its file")


def _took_head(buffer: bytearray, delimiter: bytes) -> bool:
    """Take the first part's head off, if all of it is there. Raises `BadRequestError` if the part is no file."""
    opening = delimiter + b"\r\n"
    end = buffer.find(b"\r\n\r\n", len(delimiter))
    if end < 0 and opening.startswith(buffer[: len(opening)]) and len(buffer) <= MAX_HEAD_BYTES:
        return False
    head = BytesHeaderParser().parsebytes(bytes(buffer[len(opening) : end + 2]))
    if end < 0 or not buffer.startswith(opening) or head.get_filename() is None:
        raise BadRequestError(f"the form does not begin with a file; {ONE_FILE}")
    del buffer[: end + 4]
    return True
