"""What strangers send is refused by its reason, cheaply, and touches nothing; what is taken computes finite numbers.

`NUM_MUTATIONS=20000 pytest tests/kit/test_hostile.py -k mutated` mutates as often as the law asks.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import CONFIG, WEIGHTS
from server.core import Row, RunnerConfig, Sampling
from server.model.runner import Loaded, load
from tests.kit.adapters import make_lora
from tests.kit.forge import toy_config
from tests.kit.hostile import (
    HARMLESS,
    MAX_CPU_SECONDS,
    MAX_MEMORY,
    OTHER_DTYPES,
    hostile,
    mutated,
    refusal,
    take_in,
    zipped,
)

NUM_MUTATIONS = int(os.environ.get("NUM_MUTATIONS", "300"))
BODIES = hostile()


def test_there_are_enough() -> None:
    """Structures, dtypes, configs, pickles and zips: more than the 34 that were asked for, of each kind some."""
    kinds = {
        kind: sum(name.startswith(kind) for name in BODIES) for kind in ("weights", "config", "pickle", "zip", "tar")
    }
    assert kinds["weights"] > 34 + len(OTHER_DTYPES) and kinds["config"] > 20 and kinds["pickle"] > 30, kinds
    assert kinds["zip"] > 10 and kinds["tar"] > 10


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["weights", "one file", "config", "pickle", "zip", "tar"])
def test_all_are_refused_and_touch_nothing(tmp_path: Path, kind: str) -> None:
    """Each by a sentence, in under 200 ms of CPU and 32 MB; nothing is opened but below its folder, no one called."""
    refusal(zipped(), tmp_path)  # what Python imports on first use is not the bodies' doing
    for name, body in BODIES.items():
        if not name.startswith(f"{kind}:"):
            continue
        error, touched = refusal(body, tmp_path, has_memory=True)
        assert error is not None, f"{name} was taken"
        assert 10 < len(str(error)) < 500, name
        assert touched.events == [] and touched.outside(tmp_path) == [], (name, touched)
        assert touched.peak_bytes < MAX_MEMORY, (name, touched.peak_bytes)
        assert min(refusal(body, tmp_path)[1].cpu_seconds for _ in range(3)) < MAX_CPU_SECONDS, name
    assert not Path("/tmp/manyhats-was-here").exists() and list(tmp_path.iterdir()) == []  # noqa: S108


def test_the_watch_sees(tmp_path: Path) -> None:
    """The watch itself notices a file that is opened outside, a connection and a process."""
    from tests.kit.watch import watched

    with watched() as touched:
        if Path("/etc/hostname").exists():
            Path("/etc/hostname").open().close()
        with pytest.raises(OSError), __import__("socket").socket() as one:
            one.connect(("127.0.0.1", 9))
    assert touched.outside(tmp_path) and any("connect" in event for event in touched.events)


@pytest.mark.parametrize("name", HARMLESS)
def test_words_are_data(tmp_path: Path, name: str) -> None:
    """A regex, a path or a URL in a config is never run, read or fetched: the adapter is taken as any other."""
    error, touched = refusal(zipped(config=json.dumps(toy_config(**HARMLESS[name])).encode()), tmp_path)
    assert error is None and touched.events == [] and touched.outside(tmp_path) == []
    assert touched.cpu_seconds < MAX_CPU_SECONDS


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, bytes]:
    """A base that is ready to run, and a sound LoRA for it as one file."""
    folder = make_lora(tmp_path_factory.mktemp("sound") / "lora", tiny_base, r=2, target_modules=["q_proj", "k_proj"])
    metadata = {"adapter_config": (folder / CONFIG).read_text()}
    loaded = load(RunnerConfig(folder=str(tiny_base), name="t", precision="fp16", num_threads=1, kv_cache_bytes=2**20))
    return loaded, save(load_file(folder / WEIGHTS), metadata=metadata)


@settings(max_examples=NUM_MUTATIONS, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**63))
def test_a_mutated_artifact_is_refused_or_finite(
    served: tuple[Loaded, bytes], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Whatever is changed in a sound file: a refusal with a sentence, at intake or of the row that wears it, or finite
    logits; and the row beside it is what it is alone."""
    (loaded, sound), draw, room = served, random.Random(seed), tmp_path_factory.mktemp("room")
    bare = Row([5, 6, 7], 0, [0], sampling=Sampling())
    loaded.runner.run([bare])
    alone = loaded.runner.last_logits[0].clone()
    try:
        slot = loaded.adapter_slots.insert(loaded.adapter_slots.pack(take_in(mutated(sound, draw), room, loaded.spec)))
    except ArtifactError as error:
        assert 10 < len(str(error)) < 500
        return
    try:
        _, worn = loaded.runner.run([bare, Row([5, 6, 7], 0, [1], ((slot, 1.0),), Sampling())])
        assert worn is not None
        assert worn.error == "the logits are not finite" or bool(torch.isfinite(loaded.runner.last_logits[1]).all())
        assert torch.equal(loaded.runner.last_logits[0], alone)
    finally:
        loaded.adapter_slots.drop(slot)
