"""The committed workloads, and the corpus that their prompts are cut from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import make_workloads, workload
from tests.kit.tiny import make_tokenizer


def test_the_committed_files_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is seeded: it makes the committed files again, byte for byte."""
    committed = {name: (workload.FOLDER / f"{name}.json").read_bytes() for name in workload.names()}
    monkeypatch.setattr(workload, "FOLDER", tmp_path)
    make_workloads.main()
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == committed


def test_mixed_same_and_base_ask_equal_work() -> None:
    """W2, W3 and W4 have the same lengths in the same order, of the means asked for, and no common prompts."""
    same, mixed, base = (workload.read(name) for name in ("W2", "W3", "W4"))
    sizes = [[(r.num_prompt, r.max_tokens) for r in one.requests] for one in (same, mixed, base)]
    assert sizes[0] == sizes[1] == sizes[2]
    prompts, answers = zip(*sizes[0], strict=True)
    assert sum(prompts) / len(prompts) == pytest.approx(128, abs=1)
    assert sum(answers) / len(answers) == pytest.approx(64, abs=1)
    offsets = [request.offset for one in (same, mixed, base) for request in one.requests]
    assert len(set(offsets)) == len(offsets)


def test_prompts_are_cut_at_their_offsets() -> None:
    """A prompt has the number of tokens that its request says, from its offset on."""
    one = workload.read("W3", num_requests=5)
    corpus = make_tokenizer()(workload.CORPUS.read_text(), verbose=False).input_ids
    prompts = [request.prompt for request in workload.prompted(one, corpus)]
    assert [len(prompt) for prompt in prompts] == [request.num_prompt for request in one.requests]
    assert prompts[0][0] == corpus[one.requests[0].offset]


def test_a_short_corpus_is_refused() -> None:
    """A base whose tokenizer makes too few tokens of the corpus is refused with both numbers."""
    with pytest.raises(ValueError, match=r"W3 needs a corpus of .* tokens; of this base it has 100"):
        workload.prompted(workload.read("W3"), [0] * 100)
