"""Answers in OpenAI's shape: completions and chat completions, plain and streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from server.requests.answer import Chunk, Generation, GenerationState
from server.requests.tokenizer import REPLACEMENT, Tokenizer


class OpenAIForm:
    """Writes the parts that both shapes share; a shape says how a choice looks, whole and as a delta."""

    prefix: str  # of the answer's id
    kind: str
    chunk_kind: str

    def __init__(
        self, request_id: str, model: str, tokenizer: Tokenizer, has_logprobs: bool, include_usage: bool
    ) -> None:
        self._tokenizer, self._has_logprobs, self._include_usage = tokenizer, has_logprobs, include_usage
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """A whole choice, as a plain answer has it."""
        raise NotImplementedError

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """A choice's next piece, as a stream has it."""
        raise NotImplementedError

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of a plain answer: its choices and usage."""
        choices = [self.choice(choice) for choice in await generation.collect()]
        return self._head | {"object": self.kind, "choices": choices, "usage": _usage(generation.progress)}

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event a chunk that has text, log-probabilities or an end; then the usage, if it was asked for."""
        head = self._head | {"object": self.chunk_kind}
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                if chunk.text or chunk.finish_reason is not None or chunk.logprobs:
                    yield head | {"choices": [self.delta(chunk)]} | usage
        if self._include_usage:
            yield head | {"choices": [], "usage": _usage(generation.progress)}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)


class CompletionForm(OpenAIForm):
    """Writes answers of POST /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """Text, with OpenAI's older form of log-probabilities."""
        logprobs = self._logprobs(chunk) if self._has_logprobs else None
        return {"index": chunk.index, "text": chunk.text, "finish_reason": chunk.finish_reason, "logprobs": logprobs}

    delta = choice

    def _logprobs(self, chunk: Chunk) -> dict[str, Any]:
        """Parallel lists; `text_offset` counts characters of the answer, also over chunks."""
        tokens = [self._text(token) for token in chunk.token_ids]
        starts = []
        for token in tokens:
            starts.append(self._offsets.get(chunk.index, 0))
            self._offsets[chunk.index] = starts[-1] + len(token)
        tops = [{self._text(token): value for token, value in logprobs.top} for logprobs in chunk.logprobs]
        chosen = [logprobs.chosen for logprobs in chunk.logprobs]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": starts}


class ChatForm(OpenAIForm):
    """Writes answers of POST /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._opened: set[int] = set()  # choices whose role was sent

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """The assistant's message, whole."""
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        return {"index": chunk.index, "message": message, **self._rest(chunk)}

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """The message's next piece; the first of a choice says the role."""
        role = {} if chunk.index in self._opened else {"role": "assistant"}
        self._opened.add(chunk.index)
        return {"index": chunk.index, "delta": {**role, "content": chunk.text}, **self._rest(chunk)}

    def _rest(self, chunk: Chunk) -> dict[str, Any]:
        logprobs = {"content": self._logprobs(chunk), "refusal": None} if self._has_logprobs else None
        return {"finish_reason": chunk.finish_reason, "logprobs": logprobs}

    def _logprobs(self, chunk: Chunk) -> list[dict[str, Any]]:
        pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
        return [
            self._entry(token_id, logprobs.chosen) | {"top_logprobs": [self._entry(*top) for top in logprobs.top]}
            for token_id, logprobs in pairs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._text(token_id)
        is_part = REPLACEMENT in token  # of a character: its own bytes are not known here
        return {"token": token, "logprob": logprob, "bytes": None if is_part else list(token.encode())}


def _usage(progress: GenerationState) -> dict[str, Any]:
    return {
        "prompt_tokens": progress.num_prompt,
        "completion_tokens": progress.num_completion,
        "total_tokens": progress.num_tokens,
        "prompt_tokens_details": {"cached_tokens": progress.usage()["cached_tokens"]},
        "virtual_tokens": progress.usage()["virtual_tokens"],
    }
