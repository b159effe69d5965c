"""Answers as the OpenAPI document describes them: types for the reader and the document, never run through Pydantic.

Routes write plain dicts; tests hold every answer that they get against these. A key that is not always there is
`NotRequired`, one that may be null says so.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12

FinishReason = Literal["stop", "length"]
CallFinishReason = Literal["stop", "length", "tool_calls"]


class ErrorFacts(TypedDict):
    """The parts of an error that are for programs."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "rate_limit_error",
        "server_error",
    ]
    code: str
    param: str | None
    request_id: str


class ErrorObject(ErrorFacts):
    """An error: `code` is for programs, `message` for people; `param` names what is wrong."""

    message: str


class ErrorAnswer(TypedDict):
    """The body of every error."""

    error: ErrorObject


# Health


class LiveAnswer(TypedDict):
    """The API process runs."""

    status: Literal["live"]


class FusedAnswer(TypedDict):
    """Parts of one kind: how many are fused, of how many that the base has."""

    fused: int
    total: int


class ForwardAnswer(TypedDict):
    """The report of how the base is computed."""

    backend: str
    precision: str
    num_threads: int
    num_layers: int
    attentions: FusedAnswer
    gated_blocks: FusedAnswer
    norms: FusedAnswer
    is_whole_decoder: bool
    is_direct: bool
    rotary: str


class ReadyAnswer(TypedDict):
    """The server takes new work."""

    status: Literal["ready"]
    base: str
    precision: str
    load_seconds: float
    imports_pending: int
    forward: NotRequired[ForwardAnswer]


class NotReadyAnswer(TypedDict):
    """The server takes no new work, for this reason."""

    status: Literal["not ready"]
    reason: str


# Generations


class AdapterAnswer(TypedDict):
    """The version that answers."""

    version: int
    digest: str
    method: str


class WeightedAdapterAnswer(AdapterAnswer):
    """A version among several that are composed."""

    task: str
    weight: float


class TokenAnswer(TypedDict):
    """A token with its log-probability; `bytes` tell it also if it is a part of a character."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class ChosenTokenAnswer(TokenAnswer):
    """The chosen token, with the best ones at its place."""

    top: list[TokenAnswer]


class UsageAnswer(TypedDict):
    """Tokens of a request, of all its prompts and answers."""

    prompt_tokens: int
    cached_tokens: int
    virtual_tokens: int
    completion_tokens: int


class TimingAnswer(TypedDict):
    """Milliseconds: in the queue, for the adapter to load, until the first token, in all."""

    queued_ms: float
    load_ms: float
    ttft_ms: float
    total_ms: float


class CalledFunctionAnswer(TypedDict):
    """A function that is called, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCallAnswer(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class _Choice(TypedDict):
    text: str
    token_ids: list[int]
    logprobs: NotRequired[list[ChosenTokenAnswer]]
    prompt_logprobs: NotRequired[list[ChosenTokenAnswer | None]]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallAnswer]]
    label_probs: NotRequired[dict[str, float]]


class ChoiceAnswer(_Choice):
    """A whole answer to one prompt; with tools, what it says and calls apart."""

    finish_reason: CallFinishReason


class _GenerateHead(TypedDict):
    id: str
    task: str
    adapter: AdapterAnswer | None
    adapters: NotRequired[list[WeightedAdapterAnswer]]


class GenerateAnswer(_GenerateHead):
    """The answers to all prompts, in order; `adapter` is null for the base."""

    choices: list[ChoiceAnswer]
    usage: UsageAnswer
    timing: TimingAnswer


class GenerateEvent(_GenerateHead, _Choice):
    """The next piece of the answer `index`; the very last has `usage` and `timing`."""

    index: int
    finish_reason: CallFinishReason | None
    usage: NotRequired[UsageAnswer]
    timing: NotRequired[TimingAnswer]


class ScoreAnswer(TypedDict):
    """The log-probability of a continuation, and whether each of its tokens is the best one at its place."""

    logprob: float
    num_tokens: int
    is_greedy: bool
    token_logprobs: NotRequired[list[float]]


class ScoresAnswer(TypedDict):
    """The scores of all continuations, in order."""

    scores: list[ScoreAnswer]
    usage: UsageAnswer


# Adapters and tasks


class UseAnswer(TypedDict):
    """Requests that were answered, and their tokens."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class SpreadAnswer(TypedDict):
    """The median and the 95th percentile, in milliseconds."""

    p50: float
    p95: float


class RecentAnswer(TypedDict):
    """A version's last requests since this server started."""

    requests: int
    failed: int
    ttft_ms: SpreadAnswer | None
    latency_ms: SpreadAnswer | None
    tokens: int


class RouteAnswer(TypedDict):
    """The weights by which requests are shared among versions."""

    versions: dict[str, float]
    sticky: Literal["user"] | None


class _Identity(TypedDict):
    version: int
    digest: str
    method: str
    num_parameters: int
    bytes: int
    slot_bytes: int | None
    virtual_tokens: int


class VersionAnswer(_Identity):
    """A version of a task; `slot_bytes` is null before an engine was there."""

    note: str
    created: float
    residency: Literal["disk", "loading", "host", "slot", "failed", "quarantined"]
    use: UseAnswer
    recent: RecentAnswer


class TaskAnswer(TypedDict):
    """A task with a page of its versions; `num_versions` is how many there are."""

    task: str
    versions: list[VersionAnswer]
    route: RouteAnswer
    pinned: bool
    num_versions: int


class BaseTaskAnswer(TypedDict):
    """The base itself, which has no versions."""

    task: Literal["base"]
    versions: list[VersionAnswer]
    route: RouteAnswer
    use: UseAnswer


class TasksAnswer(TypedDict):
    """A page of tasks; `next` is the `after` of the next one."""

    tasks: list[TaskAnswer | BaseTaskAnswer]
    next: str | None


class CheckAnswer(TypedDict):
    """A check that the adapter passed, with its figure and, of some, what is allowed."""

    name: str
    ok: Literal[True]
    figure: float | str
    detail: str
    limit: NotRequired[float]


class UploadAnswer(_Identity):
    """The version that an upload is."""

    task: str
    checks: list[CheckAnswer]
