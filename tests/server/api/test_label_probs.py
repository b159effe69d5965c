"""`label_probs` of POST /generate: how probable each label of a form is behind each prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.core import EngineFailure
from server.engine.messages import Output, Submit
from server.requests.prepare import MAX_SCORED_LABELS
from server.schemas import MAX_PROMPTS
from tests.server.world import MAX_TOKENS, Site, error_of

pytestmark = pytest.mark.anyio
LABELS = ["b", "éé", "abc"]
CHOICE = {"type": "choice", "choices": LABELS}
MANY = {"type": "choice", "choices": [f"{number}" for number in range(MAX_SCORED_LABELS // MAX_PROMPTS + 1)]}
BODY: dict[str, Any] = {"prompt": "xy", "response_format": CHOICE, "label_probs": True, "max_tokens": 4}
LENGTHS = {"b": 1, "éé": 4, "abc": 3}
WEIGHTS = {label: math.exp(-0.25 * length) for label, length in LENGTHS.items()}  # as the fake engine scores a token
WANTED = {label: weight / sum(WEIGHTS.values()) for label, weight in WEIGHTS.items()}


def is_score(submit: Submit) -> bool:
    """Tell the sequences of labels from those of choices."""
    return submit.sampling.max_tokens == 0


async def test_each_choice_tells_its_labels(shared: Site) -> None:
    """Choices of a prompt have the same, scored once behind the prompt by the adapters that answer; n, streams too."""
    shared.engine.submitted.clear()
    answer = await shared.ask("one", **BODY | {"prompt": ["xy", "z"], "n": 2})
    for choice in answer["choices"]:
        assert choice["label_probs"] == pytest.approx(WANTED) and [*choice["label_probs"]] == LABELS
    scored = [submit for submit in shared.engine.submitted if is_score(submit)]
    behind = [[*prompt.encode(), *label.encode()] for prompt in ("xy", "z") for label in LABELS]
    assert sorted(submit.prompt for submit in scored) == sorted(behind)
    assert {(len(submit.prompt) > 2, submit.sampling.scored_from) for submit in scored} >= {(True, 2), (True, 1)}
    assert all(submit.form is None and len(submit.adapters) == 1 for submit in scored)
    assert answer["usage"]["prompt_tokens"] == 2 + 1 + 2 * sum(LENGTHS.values())
    assert answer["usage"]["completion_tokens"] == 2 * 3 + 2 * 2
    events = await shared.events("/generate?task=one", **BODY | {"n": 2})
    told = [event["label_probs"] for event in events if "label_probs" in event]
    assert told == [answer["choices"][0]["label_probs"]] * 2
    assert all(("label_probs" in event) == (event["finish_reason"] is not None) for event in events)


async def test_labels_without_an_answer(shared: Site) -> None:
    """With `max_tokens: 0` the probabilities are all that there is; two labels that are one are one."""
    body = BODY | {"max_tokens": 0, "response_format": {"type": "choice", "choices": [*LABELS, "b"]}}
    answer = await shared.ask(**body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert choice["label_probs"] == pytest.approx(WANTED)
    turns = {"prompt": None, "prompt_token_ids": [120, 121]}
    assert (await shared.ask(**body | turns))["choices"] == answer["choices"]
    assert "label_probs" not in (await shared.ask(**BODY | {"label_probs": False}))["choices"][0]


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/generate?task=base", BODY | {"response_format": None}, 400, "label_probs"),
    ("/generate?task=base", {"prompt": "a", "label_probs": True}, 400, "label_probs"),
    ("/generate?task=base", BODY | {"response_format": {"type": "regex", "regex": "a|b"}}, 400, "label_probs"),
    ("/generate?task=base", BODY | {"response_format": {"type": "json_object"}}, 400, "label_probs"),
    ("/generate?task=base", BODY | {"label_probs": 1}, 422, "label_probs"),
    ("/generate?task=base", BODY | {"prompt": ["a"] * MAX_PROMPTS, "response_format": MANY}, 400, "label_probs"),
    ("/generate?task=base", BODY | {"prompt": "a" * (MAX_TOKENS - 3), "max_tokens": 1}, 400, "label_probs"),
    ("/generate?task=base", {"inputs": "a", "label_probs": True}, 422, "label_probs"),
    ("/score?task=base", {"prompt": "a", "continuations": ["b"], "label_probs": True}, 422, "label_probs"),
    ("/v1/completions", {"model": "base", "prompt": "a", "label_probs": True}, 400, "label_probs"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
async def test_what_has_no_labels_is_named(
    shared: Site, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    """A request without labels, or with more or longer ones than can be scored, is refused by the field's name."""
    answer = await shared.post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_label_that_fails_ends_the_answer(
    shared: Site, monkeypatch: pytest.MonkeyPatch, *, is_stream: bool
) -> None:
    """An answer whose labels the engine could not score is an error, and nothing of it runs on."""
    outputs = shared.engine._outputs

    def fail(submit: Submit) -> list[Output]:
        is_last = is_score(submit) and submit.prompt[-1] == ord("c")
        failure = EngineFailure("deadline_exceeded", "the request did not end before its deadline")
        return [Output(submit.sequence_id, failure=failure)] if is_last else outputs(submit)

    monkeypatch.setattr(shared.engine, "_outputs", fail)
    answer = await shared.post("/generate?task=base", BODY | {"stream": is_stream})
    assert "deadline_exceeded" in answer.text and "label_probs" not in answer.text
    assert shared.engine.stats.num_running == 0
