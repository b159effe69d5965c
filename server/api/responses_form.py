"""Answers in the form of OpenAI's responses: whole, and as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from server.api.openai_form import token_entries
from server.api.respond import AnswerForm
from server.api.sse import Event, data_line
from server.errors import ServerError
from server.requests.answer import Chunk, Generation
from server.requests.tokenizer import Tokenizer

INCOMPLETE = {"reason": "max_output_tokens"}


class ResponsesForm(AnswerForm):
    """Writes a response with one message of one text.

    `echoed` is what the response tells of its request. A stream begins once there is something to tell: an error before
    that is an ordinary answer. A later one ends it with the event `response.failed`.
    """

    end = b""

    def __init__(self, request_id: str, tokenizer: Tokenizer, has_logprobs: bool, echoed: dict[str, Any]) -> None:
        self._tokenizer, self._has_logprobs, self._message_id = tokenizer, has_logprobs, f"msg_{request_id}"
        head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time())}
        fixed = {"background": False, "previous_response_id": None, "store": False, "truncation": "disabled"}
        self._head = head | fixed | {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True} | echoed
        self._told = Chunk.empty(0)  # of the answer
        self._number = 0  # of events

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of a plain answer."""
        (self._told,) = await generation.collect()
        return self._ended(generation)

    async def events(self, generation: Generation) -> AsyncGenerator[Event]:
        """Yield the events of a stream: the response, its message, the text piece by piece, and all of them ended."""
        is_begun = False
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                if not is_begun:
                    is_begun = True
                    for event in self._beginning(generation):
                        yield event
                self._told.extend(chunk)
                if chunk.text or (self._has_logprobs and chunk.token_ids):
                    delta = {"delta": chunk.text, "logprobs": self._logprobs(chunk)}
                    yield self._event("response.output_text.delta", **self._place, **delta)
        for event in self._end(generation):
            yield event

    def written(self, event: Event) -> bytes:
        """An event with its type as its name."""
        return f"event: {event['type']}\n".encode() + data_line(event)

    def failure(self, error: ServerError, request_id: str) -> bytes:
        """The event of a response that failed, with the text until then."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = error.wire(request_id)["error"] | {"code": code, "type": error.code}
        message = [self._message("incomplete")]
        return self.written(self._event("response.failed", response=self._response("failed", message, error=told)))

    def _beginning(self, generation: Generation) -> Iterator[Event]:
        self._note_sampling(generation)
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", []))
        item = self._message("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=self._part())

    def _end(self, generation: Generation) -> Iterator[Event]:
        part, response = self._part(), self._ended(generation)
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", **self._place, **text)
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    @property
    def _place(self) -> dict[str, Any]:
        """The place of the text in the response."""
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _ended(self, generation: Generation) -> dict[str, Any]:
        """The response at its end: complete, or cut at its most tokens."""
        self._note_sampling(generation)
        is_cut, usage = self._told.finish_reason == "length", generation.progress.usage()
        status = "incomplete" if is_cut else "completed"
        return self._response(
            status,
            [self._message(status)],
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

    def _note_sampling(self, generation: Generation) -> None:
        """Tell the sampling that the response has, which may be the adapter's own."""
        sampling = generation.job.sampling
        self._head |= {"temperature": sampling.temperature, "top_p": sampling.top_p}

    def _response(self, status: str, output: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        unset = {"error": None, "incomplete_details": None, "usage": None}
        return self._head | {"status": status, "output": output} | unset | fields

    def _message(self, status: str) -> dict[str, Any]:
        head = {"id": self._message_id, "type": "message", "role": "assistant", "status": status}
        return head | {"content": [self._part()]}

    def _part(self) -> dict[str, Any]:
        """The text so far."""
        logprobs = self._logprobs(self._told)
        return {"type": "output_text", "text": self._told.text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, chunk: Chunk) -> list[dict[str, Any]]:
        return token_entries(self._tokenizer, chunk) if self._has_logprobs else []
