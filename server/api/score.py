"""POST /score: how probable continuations of a prompt are, by any adapter. Nothing is generated."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api.answers import ScoresAnswer
from server.api.body import read_json
from server.api.deps import caller_of, counted_callers, state_of
from server.api.disconnect import unless_disconnected
from server.api.document import COUNTED, GENERATES, errors, says
from server.core import Logprobs, Sampling
from server.requests.answer import Generation
from server.requests.auth import GENERATE, Caller
from server.requests.spec import GenerationSpec
from server.schemas import ScoreRequest, openapi_body

router = APIRouter(
    tags=["Generate"],
    dependencies=counted_callers(GENERATE),
    responses=errors(*COUNTED, *GENERATES, 422),
)


@router.post("/score", openapi_extra=openapi_body(ScoreRequest), responses=says(ScoresAnswer))
async def score(request: Request, task: str | None = None) -> Response:
    """Score continuations of a prompt by a task's adapter; what they share is computed once."""
    state, caller = state_of(request), caller_of(request)
    asked = await read_json(request, ScoreRequest, state)
    generation = request.state.generation = state.generation.run(_spec(caller, task, asked))
    return JSONResponse(await unless_disconnected(request.receive, _whole(generation, asked.logprobs)))


def _spec(caller: Caller, task: str | None, asked: ScoreRequest) -> GenerationSpec:
    """The spec of a body. Raises `BadRequestError` if it names no task, or two sets of adapters."""
    return GenerationSpec(
        tenant=caller.tenant,
        limits=caller.limits,
        **asked.resolvable(task),
        texts=None if asked.prompt is None else [asked.prompt],
        token_ids=None if asked.prompt_token_ids is None else [asked.prompt_token_ids],
        sampling=Sampling(),
        max_tokens=0,
        prompt_logprobs=0,
        continuations=asked.continuations,
    )


async def _whole(generation: Generation, has_logprobs: bool) -> dict[str, Any]:
    """The body of an answer: the score of each continuation, and the usage."""
    prompts = [choice.prompt for choice in await generation.collect()]
    scores = [_score(prompt.scores, has_logprobs) for prompt in prompts if prompt is not None]
    return {"scores": scores, "usage": generation.progress.usage()}


def _score(scores: list[Logprobs], has_logprobs: bool) -> dict[str, Any]:
    logprobs = [score.chosen for score in scores]
    figures = {
        "logprob": sum(logprobs),
        "num_tokens": len(logprobs),
        "is_greedy": all(score.is_greedy for score in scores),
    }
    return figures | ({"token_logprobs": logprobs} if has_logprobs else {})
