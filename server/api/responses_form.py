"""Answers in the form of OpenAI's responses: whole, and as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from server.api.openai_form import parts_of, token_entries
from server.api.respond import AnswerForm
from server.api.responses_output import Item, ItemStatus, OutputItems
from server.api.sse import Event, data_line
from server.errors import ServerError
from server.requests.answer import Generation
from server.requests.tokenizer import Tokenizer

INCOMPLETE = {"reason": "max_output_tokens"}


class ResponsesForm(AnswerForm):
    """Writes a response with its items: reasoning, messages of one text each, and calls.

    `echoed` is what the response tells of its request. A stream begins once there is something to tell: an error before
    that is an ordinary answer. A later one ends it with the event `response.failed`.
    """

    end = b""

    def __init__(self, request_id: str, tokenizer: Tokenizer, has_logprobs: bool, echoed: dict[str, Any]) -> None:
        self._tokenizer, self._has_logprobs = tokenizer, has_logprobs
        head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time())}
        fixed = {"background": False, "previous_response_id": None, "store": False, "truncation": "disabled"}
        self._head = head | fixed | echoed
        self._output = OutputItems(request_id, self._event)
        self._number = 0  # of events

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of a plain answer: the response as a stream ends with it."""
        response: dict[str, Any] = {}
        async with aclosing(self.events(generation)) as events:
            async for event in events:
                response = event.get("response", response)
        return response

    async def events(self, generation: Generation) -> AsyncGenerator[Event]:
        """Yield the events of a stream: the response, its items piece by piece, and all of them ended."""
        is_begun, reason = False, None
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                if not is_begun:
                    is_begun = True
                    self._note_sampling(generation)
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._response("in_progress", []))
                scores = token_entries(self._tokenizer, chunk) if self._has_logprobs else []
                for event in self._output.push(parts_of(chunk), scores):
                    yield event
                reason = chunk.finish_reason
        for event in self._ending(generation, is_cut=reason == "length"):
            yield event

    def written(self, event: Event) -> bytes:
        """An event with its type as its name."""
        return f"event: {event['type']}\n".encode() + data_line(event)

    def failure(self, error: ServerError, request_id: str) -> bytes:
        """The event of a response that failed, with the items until then."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = error.wire(request_id)["error"] | {"code": code, "type": error.code}
        response = self._response("failed", self._output.cut(), error=told)
        return self.written(self._event("response.failed", response=response))

    def _ending(self, generation: Generation, is_cut: bool) -> Iterator[Event]:
        """End the last item, and the response: it is complete, or cut at its most tokens."""
        status: ItemStatus = "incomplete" if is_cut else "completed"
        yield from self._output.end(status)
        usage = generation.progress.usage()
        response = self._response(
            status,
            self._output.items,
            incomplete_details=INCOMPLETE if is_cut else None,
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["cached_tokens"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": generation.progress.num_tokens,
                "virtual_tokens": usage["virtual_tokens"],
            },
        )
        yield self._event(f"response.{status}", response=response)

    def _event(self, kind: str, /, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _note_sampling(self, generation: Generation) -> None:
        """Tell the sampling that the response has, which may be the adapter's own."""
        sampling = generation.job.sampling
        self._head |= {"temperature": sampling.temperature, "top_p": sampling.top_p}

    def _response(self, status: str, output: list[Item], **fields: Any) -> dict[str, Any]:
        unset = {"error": None, "incomplete_details": None, "usage": None}
        return self._head | {"status": status, "output": output} | unset | fields
