"""What a base runs as is said, and a fast path is never lost in silence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from server.core import FusedCount, RunnerConfig
from server.model import runner
from server.model.backends.cpu import decoder, layers
from server.model.errors import FusedPartError
from server.model.load import load_base
from server.model.runner import load
from tests.kit.tiny import make_tiny_base


def broken(*_args: Any) -> None:
    raise ValueError("a broken kernel")


def config_of(folder: Path) -> RunnerConfig:
    return RunnerConfig(folder=str(folder), name="t", precision="fp32", num_threads=1, kv_cache_bytes=2**22)


@pytest.mark.parametrize(
    ("room", "kernel", "part"),
    [(layers, "rms_norm", r"model\.layers\.0\.input_layernorm"), (layers, "gate", r"model\.layers\.0\.mlp"),
     (decoder, "decoder_layers", "all layers")],
)  # fmt: skip
def test_a_broken_kernel_is_raised_with_the_parts_name(
    room: Any, kernel: str, part: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If our kernel fails on a part that was recognised, loading fails and names the part."""
    monkeypatch.setattr(room, kernel, broken)
    with pytest.raises(FusedPartError, match=rf"{part}.*a broken kernel"):
        load_base(tiny_base, "tiny", "fp32", "cpu")


def test_an_error_of_our_own_is_not_the_bases(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError of our code at loading reaches the operator as it is, not as a base that cannot be served."""

    def report(*_args: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("server.model.load.report_forward", report)
    with pytest.raises(KeyError, match="ours"):
        load_base(tiny_base, "tiny", "fp32", "cpu")


def test_a_fused_base_says_all_of_it(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A llama reports every part as fused, in one sentence, and nothing is warned of."""
    with caplog.at_level(logging.WARNING, runner.__name__):
        forward = load(config_of(tiny_base)).forward
    assert forward.describe() == (
        "cpu backend, fp32, 1 thread: 2/2 attentions, 2/2 gated blocks, 5/5 norms fused, whole decoder, direct forward"
    )
    assert forward.is_fastest and not caplog.records


def test_a_fast_path_that_is_lost_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base of which nothing can be fused reports zeros, and the log warns with the same sentence."""
    forward = load(config_of(make_tiny_base(tmp_path / "base", "gpt2"))).forward
    assert {forward.attentions, forward.gated_blocks} == {FusedCount(0, forward.num_layers)}
    assert forward.norms.fused == 0 < forward.norms.total and not (forward.is_whole_decoder or forward.is_direct)
    assert [record.message for record in caplog.records] == [
        f"the base is served slower than it could be: {forward.describe()}"
    ]
    assert "2 layers one by one, transformers' forward" in forward.describe()
