"""Answers in the form of LoRAX and TGI: whole, with details, and token by token."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.api.respond import AnswerForm
from server.api.sse import data_line
from server.core import Logprobs
from server.errors import ServerError
from server.requests.answer import Chunk, Generation, ReadPrompt
from server.requests.detokenizer import TextStream
from server.requests.tokenizer import Tokenizer


@dataclass(frozen=True)
class Details:
    """The parts of an answer that a request asks for besides its text; `lead` is text that is put before it."""

    is_told: bool
    num_top: int  # of TGI's `top_n_tokens`
    num_alternatives: int  # of LoRAX's `return_k_alternatives`
    lead: str


class TextGenerationForm(AnswerForm):
    """Writes an answer with one choice. A stop text is shown, as these servers show it, with the token that ends it."""

    end = b""  # LoRAX's client takes [DONE] for a broken event

    def __init__(self, tokenizer: Tokenizer, details: Details, is_listed: bool) -> None:
        self._tokenizer, self._details, self._is_listed = tokenizer, details, is_listed
        self._stream: TextStream | None = None
        self._text = ""  # of the answer, so far

    async def whole(self, generation: Generation) -> Any:
        """The body of a plain answer, in a list of one if the route has it so."""
        (choice,) = await generation.collect()
        tokens = self._tokens(generation, choice)
        answer: dict[str, Any] = {"generated_text": self._details.lead + self._text}
        if self._details.is_told:
            answer["details"] = self._end(generation, choice) | {
                "skipped_tokens": 0,
                "prefill": [] if choice.prompt is None else self._prefill(choice.prompt),
                "tokens": tokens,
            }
            if self._details.num_top:
                answer["details"]["top_tokens"] = [self._top(logprobs) for logprobs in choice.logprobs]
        return [answer] if self._is_listed else answer

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event a token; the last has the whole text, and the details."""
        index = 0
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                tokens = self._tokens(generation, chunk)
                for token, logprobs in zip(tokens, chunk.logprobs, strict=True):
                    index += 1
                    top = {"top_tokens": self._top(logprobs)} if self._details.num_top else {}
                    is_last = chunk.finish_reason is not None and token is tokens[-1]
                    yield {"index": index, "token": token} | top | self._tail(generation, chunk, is_last)

    def failure(self, error: ServerError, request_id: str) -> bytes:
        """The error that ends a stream."""
        return b"event: error\n" + data_line(error.text_generation_wire(request_id))

    def _tail(self, generation: Generation, chunk: Chunk, is_last: bool) -> dict[str, Any]:
        """The parts of an event that only the last one has."""
        if not is_last:
            return {"generated_text": None, "details": None}
        details = self._end(generation, chunk) | {"input_length": generation.progress.num_prompt}
        is_told = self._details.is_told
        return {"generated_text": self._details.lead + self._text, "details": details if is_told else None}

    def _end(self, generation: Generation, chunk: Chunk) -> dict[str, Any]:
        sampling = generation.job.sampling
        stopped = "stop_sequence" if chunk.is_stopped else "eos_token"
        return {
            "finish_reason": stopped if chunk.finish_reason == "stop" else chunk.finish_reason,
            "prompt_tokens": generation.progress.num_prompt,
            "generated_tokens": generation.progress.num_completion,
            "seed": sampling.seed if sampling.temperature else None,
        }

    def _tokens(self, generation: Generation, chunk: Chunk) -> list[dict[str, Any]]:
        """A chunk's tokens, whose texts follow one another in the answer; those that are no part of it are special.

        The token that ends an answer is none, whatever it is. Bytes that never become a character are in the whole text
        alone, or also in that of the last token if it has one.
        """
        stream = self._stream = self._stream or TextStream(self._tokenizer, [], generation.job.prompts[0])
        num_shown = len(chunk.token_ids) - (chunk.finish_reason == "stop" and not chunk.is_stopped)
        texts = [
            None if at >= num_shown or self._tokenizer.is_special(token_id) else stream.push(token_id)
            for at, token_id in enumerate(chunk.token_ids)
        ]
        rest = "" if chunk.finish_reason is None else stream.flush()
        self._text += "".join([*filter(None, texts), rest])
        if texts and texts[-1] is not None:
            texts[-1] += rest
        scores = chunk.logprobs or [Logprobs(0.0)] * len(texts)  # of an answer without details, which shows none
        return [self._token(*one) for one in zip(chunk.token_ids, texts, scores, strict=True)]

    def _token(self, token_id: int, text: str | None, logprobs: Logprobs) -> dict[str, Any]:
        """A token of the answer; one without a text is special, and has its name."""
        token = self._plain(token_id, logprobs.chosen, text) | {"special": text is None, "skipped": False}
        if num := self._details.num_alternatives:
            token["alternative_tokens"] = [self._plain(*one) for one in logprobs.top[:num]]
        return token

    def _top(self, logprobs: Logprobs) -> list[dict[str, Any]]:
        """The best tokens at a place, each by itself."""
        return [
            self._plain(*one) | {"special": self._tokenizer.is_special(one[0]), "skipped": False}
            for one in logprobs.top[: self._details.num_top]
        ]

    def _prefill(self, prompt: ReadPrompt) -> list[dict[str, Any]]:
        logprobs = [None, *(score.chosen for score in prompt.scores)]
        return [self._plain(*pair) for pair in zip(prompt.token_ids, logprobs, strict=True)]

    def _plain(self, token_id: int, logprob: float | None, text: str | None = None) -> dict[str, Any]:
        name = self._tokenizer.token_text(token_id) if text is None else text
        return {"id": token_id, "text": name, "logprob": logprob}
