"""Copies to a device: what waits for what, told by a fake of CUDA's streams; and what arrives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.model.backends.torch_ops.copies import DeviceCopies


@dataclass
class FakeStream:
    """A stream that writes down what it is told."""

    name: str
    log: list[tuple[str, ...]]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for all of", other.name))

    def record_event(self) -> str:
        self.log.append((self.name, "records"))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))


@dataclass
class Cuda:
    """`torch.cuda`, without a GPU."""

    log: list[tuple[str, ...]] = field(default_factory=list)
    current: FakeStream | None = None

    def Stream(self, _device: torch.device) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream("side", self.log)

    def current_stream(self, _device: torch.device) -> FakeStream:
        return self.current or FakeStream("compute", self.log)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.current = stream
        yield
        self.current = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Copies as on CUDA, whose tensors are on the CPU in truth."""
    made = Cuda()
    real, empty_like = torch.Tensor.copy_, torch.empty_like

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        made.log.append((made.current_stream(source.device).name, "copies", "at once" if non_blocking else "waiting"))
        return real(self, source)

    def empty(like: torch.Tensor, device: Any) -> torch.Tensor:
        made.log.append((made.current_stream(like.device).name, "allocates"))
        return empty_like(like)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "empty_like", empty)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _self, stream: made.log.append(("kept for", stream.name)))
    return made


def test_a_step_waits_for_the_copy_that_it_wears(cuda: Cuda) -> None:
    """A slot is filled on the side stream, behind whatever used its memory; whoever wears it first waits, once."""
    copies = DeviceCopies("cuda", cuda)
    (got,) = copies.start("slot", [torch.arange(3)])
    assert cuda.log == [
        ("compute", "allocates"),
        ("side", "waits for all of", "compute"),
        ("side", "copies", "at once"),
        ("kept for", "side"),
        ("side", "records"),
    ]
    cuda.log.clear()
    copies.wait("another")
    assert not cuda.log
    copies.wait("slot")
    copies.wait("slot")
    assert cuda.log == [("compute", "waits for", "event of side")] and got.tolist() == [0, 1, 2]


def test_what_is_dropped_is_not_waited_for(cuda: Cuda) -> None:
    """A slot that was freed and filled again is waited for by its new copy's event alone."""
    copies = DeviceCopies("cuda", cuda)
    copies.start(0, [torch.zeros(2)])
    copies.release(0)
    cuda.log.clear()
    copies.wait(0)
    assert not cuda.log


@pytest.mark.parametrize("is_pinned", [False, True])
def test_arrays_arrive_as_they_are(is_pinned: bool, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step sends, of several types and shapes, also empty, arrives equal, one by one or as one buffer."""
    copies = DeviceCopies("cpu")
    if is_pinned:
        empty = torch.empty
        copies = DeviceCopies("cuda", cuda)
        copies.device = torch.device("cpu")
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, **_pinned: empty(*size, dtype=dtype))
    arrays: list[NDArray[Any]] = [
        np.arange(5),
        np.ones((3, 1), np.float32),
        np.zeros((0, 7)),
        np.arange(6).reshape(2, 3).T,
    ]
    for array, tensor in zip(arrays, copies.send(*arrays), strict=True):
        assert tensor.shape == array.shape and np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype


def test_on_a_cpu_nothing_is_copied() -> None:
    """Without streams a slot reads the host's own memory: no step waits for bytes; pinning changes nothing."""
    copies, host = DeviceCopies("cpu"), torch.arange(4)
    (got,) = copies.start(0, [copies.pin(host)])
    assert torch.equal(got, host) and got.data_ptr() == host.data_ptr()
    copies.wait(0)
