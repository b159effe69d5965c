"""The committed workloads, and the corpus that their prompts are cut from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import make_workloads, workload
from tests.benchmarks.__main__ import choose
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


def test_every_adapter_of_w5_has_its_own_prefix() -> None:
    """A prompt begins with its adapter's 512 tokens and ends with 32 that no other has."""
    one = workload.read("W5")
    prompts = workload.prompted(one, list(range(50_000)))
    beginnings = {(prompt.adapter, tuple(prompt.prompt[:512])) for prompt in prompts}
    assert len(beginnings) == len({prompt.adapter for prompt in prompts}) == len(one.prefixes) == 8
    assert len({tuple(prompt.prompt[512:]) for prompt in prompts}) == len(prompts) == 64
    assert {len(prompt.prompt) for prompt in prompts} == {544}


def test_w6_asks_w3s_work_of_more_adapters_than_fit() -> None:
    """The lengths are W3's, so that gaps compare; the adapters are 200, of which the slots hold about half."""
    mixed, many = workload.read("W3"), workload.read("W6")
    assert [(r.num_prompt, r.max_tokens) for r in many.requests] == [
        (r.num_prompt, r.max_tokens) for r in mixed.requests
    ]
    assert many.num_adapters == 200
    assert len({request.adapter for request in many.requests}) > 50


def test_open_loops_arrive_as_the_trace_did() -> None:
    """All loads have the same arrivals of one a second on average, and the same lengths, but other prompts."""
    loops = [workload.read(f"W7-{load}") for load in make_workloads.LOADS]
    assert [loop.load for loop in loops] == [0.5, 0.8, 1.2]
    assert all(loop.arrivals == loops[0].arrivals == sorted(loop.arrivals) for loop in loops)
    assert loops[0].arrivals[-1] == pytest.approx(len(loops[0].requests) - 1)
    assert len({request.offset for loop in loops for request in loop.requests}) == 3 * len(loops[0].requests)


def test_parts_are_chosen_by_their_number() -> None:
    """ "W3" is both of its workloads; an open loop brings W3, whose speed is its pace; W6 comes last."""
    assert workload.parts() == ["W1", "W2", "W3", "W4", "W5", "W6", "W7"]
    assert [one.name for one in choose(["W6", "W3"], 1)] == ["W3", "W3-uniform", "W6"]
    assert [one.name for one in choose(["W7", "W6"], 1)] == ["W3", "W7-0.5", "W7-0.8", "W7-1.2", "W6"]
