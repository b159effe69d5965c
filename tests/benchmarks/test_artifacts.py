"""Different artifacts of one method."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from tests.benchmarks.artifacts import NUM_MADE, artifacts
from tests.kit.adapters import tensors_digest
from tests.kit.forge import spec_of


@pytest.mark.parametrize("method", ["lora", "prefix-tuning"])
def test_all_differ_and_all_are_served(method: str, tiny_base: Path, tmp_path: Path) -> None:
    """Those that a maker wrote and those whose numbers were moved: each is another artifact, that compiles."""
    num = 3 * NUM_MADE
    folders = list(artifacts(method, tiny_base, tmp_path / "once", num))
    digests = [tensors_digest(folder) for folder in folders]
    assert len(set(digests)) == num
    assert digests == [tensors_digest(folder) for folder in artifacts(method, tiny_base, tmp_path / "again", num)]
    patches = [compile_patch(read_folder(folder), spec_of(tiny_base)) for folder in folders]
    assert [patch.num_items for patch in patches[: 2 * NUM_MADE]] == [patch.num_items for patch in patches[NUM_MADE:]]
