"""Every error has one form, a status that fits its code, and a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest

from adapters_store import errors as store
from server import errors
from server.core import EngineFailure

E = TypeVar("E", bound=Exception)


def tree(of: type[E]) -> Iterator[type[E]]:
    """A class and all below it."""
    yield of
    for below in of.__subclasses__():
        yield from tree(below)


def test_the_tree_is_drawn() -> None:
    """Every class of the tree is drawn at the top of the file with its status."""
    drawn = errors.__doc__ or ""
    for kind in tree(errors.ServerError):
        if kind is errors.ServerError:
            continue
        line = next(line for line in drawn.splitlines() if kind.__name__ in line)
        if "code" in vars(kind):
            assert line.endswith(str(kind.status))


def test_the_wire_form() -> None:
    """An error on the wire is type, code, message, param and request_id, and nothing else."""
    error = errors.BadRequestError("no", "field", retry_after=3)
    assert error.wire("id") == {
        "error": {
            "type": "invalid_request_error",
            "code": "bad_request",
            "message": "no",
            "param": "field",
            "request_id": "id",
        }
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
        (507, "server_error"),
    ],
)
def test_types_follow_the_status(status: int, kind: str) -> None:
    """The type that OpenAI's clients read follows from the status."""
    error = errors.ServerError("x")
    error.status = status
    assert error.wire("")["error"]["type"] == kind


def test_refusals_of_the_store() -> None:
    """Every refusal of the store has its status: 413, 415 and 503 by code, 422 for all others."""
    special = {"artifact_too_large": 413, "artifact_type": 415, "artifact_corrupt": 503}
    for kind in tree(store.ArtifactError):
        error = errors.ArtifactRefusedError(kind("why", "q_proj"))
        assert error.code == kind.code
        assert error.status == special.get(error.code, 422)
        assert (str(error), error.param) == ("why", "q_proj")


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("overloaded", 503, 1),
        ("engine_restarting", 503, 1),
        ("adapter_failed", 503, 1),
        ("deadline_exceeded", 504, None),
        ("adapter_too_large", 422, None),
        ("nonfinite_logits", 500, None),
        ("never heard of", 500, None),
    ],
)
def test_failures_of_the_engine(code: str, status: int, retry: int | None) -> None:
    """Every failure of the engine has its status, 500 if it is unknown; one that passes says when to come again."""
    error = errors.EngineFailedError(EngineFailure(code, "why"))
    assert (error.code, error.status, error.retry_after) == (code, status, retry)
