"""Requests that an engine process runs, kept so that the next process can go on with them if it dies.

An answer depends on its tokens and its seed alone, so an engine that is given a prompt and the answer so far goes on as
the dead one would have. A request may be what killed it: requests are resumed one at a time, the next one when the one
before has a token, and one that two engines died of is not tried again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from msgspec.structs import replace

from server.core import EngineFailure
from server.engine.messages import Output, Submit

MAX_RESUMES = 3  # of a request
MAX_BLAMED = 2  # engines that a request may kill
RESTARTING = EngineFailure("engine_restarting", "the engine died while it ran this request; send it again in a moment")
STOPPED = EngineFailure(
    "engine_restarting", "the server stopped before this answer was whole; send the request again in a moment"
)
HARMFUL = EngineFailure(
    "request_harmful", "two engines died of this request, so it is not tried again; the server's log says how they died"
)


@dataclass(eq=False)
class Request:
    """A request, what the engines answered so far, and how often one died while it ran."""

    submit: Submit
    outputs: asyncio.Queue[Output | None] = field(default_factory=asyncio.Queue)  # None: the engine died
    answered: list[int] = field(default_factory=list)
    num_scored: int = 0  # tokens of the prompt
    is_running: bool = False  # in the engine that lives now
    num_deaths: int = 0
    num_blamed: int = 0  # deaths of which it may be the only cause

    def note(self, output: Output) -> bool:
        """Keep the tokens of an output that its listener gets; returns whether it is the last one."""
        self.answered += output.token_ids
        self.num_scored += len(output.scores)
        return output.finish_reason is not None or output.failure is not None

    def resumed(self) -> Submit:
        """Return the message by which another engine goes on with the scores and the answer."""
        sampling = replace(self.submit.sampling, scored_from=self.submit.sampling.scored_from + self.num_scored)
        return replace(self.submit, answered=self.answered, sampling=sampling)

    def refusal(self) -> EngineFailure | None:
        """Say why it is not resumed, or None if it is."""
        if self.num_blamed >= MAX_BLAMED:
            return HARMFUL
        return RESTARTING if self.submit.is_probe or self.num_deaths > MAX_RESUMES else None


class InFlight:
    """Keeps the requests that have a listener, by sequence id, and the one that is resumed at present."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self._tried: Request | None = None  # resumed, and has no token yet
        self.trial = asyncio.Lock()  # held by the request that is resumed

    def add(self, submit: Submit) -> Request:
        """Keep a new request."""
        request = self.requests[submit.sequence_id] = Request(submit)
        return request

    def remove(self, request: Request) -> None:
        """Forget a request whose listener has gone or has all."""
        self.requests.pop(request.submit.sequence_id, None)
        self._tried = None if self._tried is request else self._tried

    def begin_trial(self, request: Request) -> None:
        """Take note that a request is resumed: until it has a token it is what the engine's death is put down to."""
        self._tried = request

    def deliver(self, output: Output) -> None:
        """Hand an output to its listener, if it still has one."""
        request = self.requests.get(output.sequence_id)
        if request is None:
            return
        self._tried = None if self._tried is request else self._tried
        request.is_running = output.finish_reason is None and output.failure is None
        request.outputs.put_nowait(output)

    def lose(self) -> None:
        """Tell the listeners of all running requests that the engine died; put it down to one of them if it can be."""
        lost = [request for request in self.requests.values() if request.is_running]
        blamed = self._tried if self._tried in lost else lost[0] if len(lost) == 1 else None
        if blamed is not None:
            blamed.num_blamed += 1
        for request in lost:
            request.is_running = False
            request.num_deaths += 1
            request.outputs.put_nowait(None)
        self._tried = None
