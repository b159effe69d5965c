"""Safetensors files from untrusted uploads: what is refused, with which message."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters_store.errors import ArtifactError
from adapters_store.format.safetensors_file import MAX_DIMENSIONS, read_tensors
from adapters_store.format.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from tests.kit.forge import entry, raw

F32 = bytes(8)  # two zeros
ONE = {"a": entry([2], 0, 8)}
SOUND = raw(ONE, F32)
INVALID, TOO_LARGE, UNSUPPORTED = "artifact_invalid", "artifact_too_large", "method_unsupported"
HOSTILE = {
    "empty": (b"", INVALID, "8-byte"),
    "seven bytes": (bytes(7), INVALID, "8-byte"),
    "header of 100 MB": ((100 * 2**20).to_bytes(8, "little") + b"{}", TOO_LARGE, "header"),
    "header of 2^63": ((2**63).to_bytes(8, "little") + b"{}", TOO_LARGE, "header"),
    "header past the end": ((100).to_bytes(8, "little") + b"{}", INVALID, "ends before"),
    "leading space": (raw(b" " + json.dumps(ONE).encode(), F32), INVALID, "begin with"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), INVALID, "begin with"),
    "a list": (raw([]), INVALID, "begin with"),
    "not JSON": (raw(b"{oops}"), INVALID, "sound JSON"),
    "two objects": (raw(b"{}{}"), INVALID, "sound JSON"),
    "trailing NUL": (raw(json.dumps(ONE).encode() + b"\0", F32), INVALID, "sound JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), INVALID, "UTF-8"),
    "duplicate name": (raw(b'{"a": %b, "a": %b}' % ((json.dumps(ONE["a"]).encode(),) * 2), F32), INVALID, "twice"),
    "depth": (raw(b'{"a":' + b"[" * 100_000), INVALID, "deeper"),
    "entry is a number": (raw({"a": 1}), INVALID, "dtype, shape"),
    "entry lacks its shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, F32), INVALID, "dtype, shape"),
    "entry has more": (raw({"a": {**ONE["a"], "more": 1}}, F32), INVALID, "dtype, shape"),
    "metadata is a list": (raw({"__metadata__": [], **ONE}, F32), INVALID, "metadata"),
    "metadata holds a number": (raw({"__metadata__": {"a": 1}, **ONE}, F32), INVALID, "metadata"),
    "name with ../": (raw({"../a": ONE["a"]}, F32), INVALID, "dotted name"),
    "name with two dots": (raw({"a..b": ONE["a"]}, F32), INVALID, "dotted name"),
    "name with a slash": (raw({"/etc/a": ONE["a"]}, F32), INVALID, "dotted name"),
    "name with NUL": (raw({"a\0": ONE["a"]}, F32), INVALID, "NUL"),
    "name with a line": (raw({"a\nb": ONE["a"]}, F32), INVALID, "dotted name"),
    "name that is empty": (raw({"": ONE["a"]}, F32), INVALID, "dotted name"),
    "name of 600 characters": (raw({"a" * 600: ONE["a"]}, F32), INVALID, "dotted name"),
    "dtype I64": (raw({"a": entry([1], 0, 8, "I64")}, F32), UNSUPPORTED, "a has dtype I64"),
    "dtype F64": (raw({"a": entry([1], 0, 8, "F64")}, F32), UNSUPPORTED, "a has dtype F64"),
    "dtype F8_E4M3": (raw({"a": entry([8], 0, 8, "F8_E4M3")}, F32), UNSUPPORTED, "a has dtype F8"),
    "dtype BOOL": (raw({"a": entry([8], 0, 8, "BOOL")}, F32), UNSUPPORTED, "a has dtype BOOL"),
    "dtype of lower case": (raw({"a": entry([2], 0, 8, "f32")}, F32), UNSUPPORTED, "a has dtype f32"),
    "dtype is a list": (raw({"a": entry([2], 0, 8, ["F32"])}, F32), UNSUPPORTED, "a has dtype"),
    "shape of 2^62": (raw({"a": entry([0, 2**62], 0, 0)}), INVALID, "a has a shape"),
    "shape that wraps around": (raw({"a": entry([2**32, 2**32], 0, 0)}), INVALID, "a of shape"),
    "2,000 dimensions": (raw({"a": entry([1] * 2000, 0, 4)}, F32[:4]), INVALID, "a has a shape"),
    "9 dimensions": (raw({"a": entry([1] * (MAX_DIMENSIONS + 1), 0, 4)}, F32[:4]), INVALID, "a has a shape"),
    "negative size": (raw({"a": entry([-2], 0, 8)}, F32), INVALID, "a has a shape"),
    "size is true": (raw({"a": entry([True, 2], 0, 8)}, F32), INVALID, "a has a shape"),
    "size is a float": (raw({"a": entry([2.0], 0, 8)}, F32), INVALID, "a has a shape"),
    "shape is a text": (raw({"a": entry("2", 0, 8)}, F32), INVALID, "a has a shape"),
    "shape is null": (raw({"a": entry(None, 0, 8)}, F32), INVALID, "a has a shape"),
    "shape is an object": (raw({"a": entry({}, 0, 4)}, F32[:4]), INVALID, "a has a shape"),
    "offsets are null": (raw({"a": {**ONE["a"], "data_offsets": None}}, F32), INVALID, "offsets"),
    "no values but bytes": (raw({"a": entry([0], 0, 8)}, F32), INVALID, "needs 0 bytes"),
    "three offsets": (raw({"a": {**ONE["a"], "data_offsets": [0, 8, 8]}}, F32), INVALID, "offsets"),
    "offsets swapped": (raw({"a": entry([2], 8, 0)}, F32), INVALID, "offsets span"),
    "offsets too narrow": (raw({"a": entry([2], 0, 4)}, F32), INVALID, "offsets span"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, F32), INVALID, "bytes of b overlap"),
    "the same bytes twice": (raw({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, F32), INVALID, "bytes of b overlap"),
    "hole": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), INVALID, "bytes of b overlap"),
    "hole at the front": (raw({"a": entry([2], 4, 12)}, bytes(12)), INVALID, "bytes of a overlap"),
    "trailing bytes": (raw(ONE, bytes(9)), INVALID, "file has 9"),
    "cut short": (raw(ONE, bytes(7)), INVALID, "file has 7"),
    "bytes of nobody": (raw({}, bytes(4)), INVALID, "file has 4"),
    "too many tensors": (
        raw({f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(MAX_TENSORS + 1)}),
        TOO_LARGE,
        "4097",
    ),
}


@pytest.mark.parametrize(("data", "code", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(data: bytes, code: str, reason: str) -> None:
    """Each is refused by its own sentence, in under 200 ms and 32 MB."""
    seconds = []
    for _ in range(3):  # the best of three: a collection of the test's own garbage is not the file's cost
        began = time.thread_time()
        with pytest.raises(ArtifactError, match=reason) as caught:
            read_tensors(data)
        seconds.append(time.thread_time() - began)
        assert caught.value.code == code
    assert min(seconds) < 0.2
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        read_tensors(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_tensor(dtype: torch.dtype, value: float) -> None:
    """One NaN or infinity among many values is found, in every dtype, and its tensor named."""
    bad = torch.ones(3, 5, dtype=dtype)
    bad[2, 4] = value
    with pytest.raises(ArtifactError, match=r"layers\.1\.bad holds a value") as caught:
        read_tensors(save({"good": torch.ones(2, dtype=dtype), "layers.1.bad": bad}))
    assert caught.value.param == "layers.1.bad"


def test_what_safetensors_writes_is_read_bit_for_bit() -> None:
    """Every dtype and odd length comes through in its own dtype, also with metadata."""
    tensors = {
        "a.half": torch.randn(3).half(),
        "b.single": torch.randn(2, 5),
        "c.brain": torch.randn(1, 1, 7).bfloat16(),
        "d.scalar": torch.randn(()),
        "e.pruned": torch.ones(0, 5),
    }
    read = read_tensors(save(tensors, metadata={"format": "pt"}))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_tensors_are_private_and_aligned() -> None:
    """A change of one tensor reaches neither the file nor another tensor, and each begins on a whole element."""
    data = save({"a": torch.zeros(3, dtype=torch.float16), "b": torch.ones(4)})
    read = read_tensors(data)
    read["a"].fill_(7)
    assert torch.equal(read["b"], torch.ones(4))
    assert torch.equal(read_tensors(data)["a"], torch.zeros(3).half())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read.values())


def test_a_long_header_costs_what_its_tensors_do() -> None:
    """A full header of 4,096 tensors costs four times what a quarter of it does: nothing is done once a pair."""

    def cost(num_tensors: int) -> float:
        tensors = {f"base_model.model.layers.{i}.lora_A.weight{'x' * 100}": torch.ones(1) for i in range(num_tensors)}
        data = save(tensors)
        assert int.from_bytes(data[:8], "little") < MAX_HEADER_BYTES
        seconds = []
        for _ in range(3):
            began = time.thread_time()
            assert len(read_tensors(data)) == num_tensors
            seconds.append(time.thread_time() - began)
        return min(seconds)

    assert cost(MAX_TENSORS) < 10 * cost(MAX_TENSORS // 4)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_spoiled_file_is_refused_or_finite(data: st.DataObject) -> None:
    """Whatever bytes of a sound file are changed, cut or added: an `ArtifactError`, or finite tensors."""
    sound = bytearray(save({"a.b": torch.ones(2, 3), "c": torch.ones(4).half()}, metadata={"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(sound) - 1))
        what = data.draw(st.sampled_from(["set", "cut", "add"]))
        if what == "set":
            sound[place] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del sound[place : place + data.draw(st.integers(1, 8))]
        else:
            sound[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        if not sound:
            break
    try:
        tensors = read_tensors(bytes(sound))
    except ArtifactError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
