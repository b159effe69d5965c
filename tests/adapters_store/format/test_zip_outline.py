"""A zip that is sent in pieces is the zip that would be made in memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.format import zip_outline
from adapters_store.format.archive import zipped
from adapters_store.format.zip_outline import StoredFile, ZipOutline, outline_zip

NAMES = st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "manifest.json", "ä.bin"])


def stored(name: str, data: bytes) -> StoredFile:
    """A file of a store that is in memory."""
    return StoredFile(name, len(data), lambda start, stop: data[start:stop])


def sent(outline: ZipOutline) -> bytes:
    """The bytes of a zip, as a client gets them."""
    parts = [
        piece if isinstance(piece, bytes) else b"".join(piece.read(*bounds) for bounds in piece.ranges())
        for piece in outline.pieces
    ]
    return b"".join(parts)


@given(st.dictionaries(NAMES, st.binary(max_size=40)), st.integers(1, 50))
def test_the_pieces_are_the_zip(files: dict[str, bytes], chunk: int) -> None:
    """The pieces of any files are, byte for byte, the zip of them; its length is known before any is sent."""
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zip_outline, "CHUNK", chunk)
        outline = outline_zip(
            [stored(*item) for item in files.items()], lambda name, data: seen.update({name: len(data)})
        )
        assert sent(outline) == zipped(files)
    assert outline.num_bytes == len(zipped(files))
    assert seen == Counter({name: len(data) for name, data in files.items()})
