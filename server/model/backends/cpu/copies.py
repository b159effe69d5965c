"""Copies on a CPU, whose memory is the host's: nothing is copied, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopies:
    """Hands tensors on as they are; nobody may write into what was handed on."""

    device = torch.device("cpu")

    def pin(self, host: Tensor) -> Tensor:
        """Return the tensor itself."""
        return host

    def start(self, key: Hashable, host: Iterable[Tensor]) -> list[Tensor]:  # noqa: ARG002 - the protocol's
        """Return the tensors themselves: a slot reads what was loaded."""
        return list(host)

    def wait(self, key: Hashable) -> None:
        """Do nothing: it is there."""

    def release(self, key: Hashable) -> None:
        """Do nothing: there is no copy."""

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Return tensors of the arrays' own memory."""
        return [torch.from_numpy(array) for array in arrays]
