"""Answers in OpenAI's shape: completions and chat completions, plain and streamed."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

from adapters_store.tools.parser import AnswerText, CallPart, Part, said_in
from server.api.respond import AnswerForm
from server.api.tool_fields import call_of
from server.core import Logprobs
from server.requests.answer import Chunk, Generation, GenerationState, ReadPrompt
from server.requests.tokenizer import Tokenizer

FIELDS = {"content": "content", "reasoning": "reasoning_content"}  # of a message, by the kind of a part


class UsageEvents(NamedTuple):
    """Says which events of a stream carry the usage: one after the last choice, or each with what was used so far."""

    is_last: bool
    is_continuous: bool


class OpenAIForm(AnswerForm):
    """Writes the parts that both shapes share; a shape says how a choice looks, whole and as a delta."""

    prefix: str  # of the answer's id
    kind: str
    chunk_kind: str

    def __init__(
        self, request_id: str, model: str, tokenizer: Tokenizer, has_logprobs: bool, usage_events: UsageEvents
    ) -> None:
        self._tokenizer, self._has_logprobs, self._usage_events = tokenizer, has_logprobs, usage_events
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """A whole choice, as a plain answer has it."""
        raise NotImplementedError

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """A choice's next piece, as a stream has it."""
        raise NotImplementedError

    def deltas(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The pieces of a chunk, as a stream has them: one, if it has text, log-probabilities or an end."""
        if chunk.text or chunk.finish_reason is not None or chunk.logprobs:
            yield self.delta(chunk)

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of a plain answer: its choices and usage."""
        choices = [self.choice(choice) for choice in await generation.collect()]
        return self._head | {"object": self.kind, "choices": choices, "usage": _usage(generation.progress)}

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event a piece of a chunk; then the usage, if it was asked for."""
        head = self._head | {"object": self.chunk_kind}
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                for delta in self.deltas(chunk):
                    yield head | {"choices": [delta]} | self._usage_so_far(generation)
        if self._usage_events.is_last:
            yield head | {"choices": [], "usage": _usage(generation.progress)}

    def _usage_so_far(self, generation: Generation) -> dict[str, Any]:
        if self._usage_events.is_continuous:
            return {"usage": _usage(generation.progress)}
        return {"usage": None} if self._usage_events.is_last else {}


class _Offset:
    """Counts characters of an answer by the bytes of its tokens; a part of a character begins as that does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def pass_over(self, data: bytes) -> int:
        """Count the characters that end in the next token's bytes, and return the place at which they begin."""
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(data))
        return start

    def pass_over_prompt(self, text: str, tokens: list[bytes]) -> list[int]:
        """Pass over a prompt's text, and return the places at which its tokens begin.

        A token that its text does not have, as the one that begins every sequence, takes no place.
        """
        starts = []
        for data in tokens:
            if data[:1] == b" " and not text.startswith(" ", self._num_characters):
                data = data[1:]  # SentencePiece's space before a text
            name = data.decode(errors="ignore")
            is_shown = not name or text.startswith(name, self._num_characters)
            starts.append(self.pass_over(data if is_shown else b""))
        self._num_characters = len(text)
        return starts


class CompletionForm(OpenAIForm):
    """Writes answers of POST /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, texts: list[str] | None, n: int) -> None:
        super().__init__(*args)
        self._texts, self._n = texts, n  # of prompts, and answers to each
        self._offsets: dict[int, _Offset] = {}  # of each choice

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """Text, behind the prompt's if that is told, with OpenAI's older form of log-probabilities."""
        before = "" if chunk.prompt is None else self._text(chunk.index, chunk.prompt)
        logprobs = self._logprobs(chunk, before) if self._has_logprobs else None
        text = before + chunk.text
        return {"index": chunk.index, "text": text, "finish_reason": chunk.finish_reason, "logprobs": logprobs}

    delta = choice

    def _text(self, index: int, prompt: ReadPrompt) -> str:
        if self._texts is None:
            return self._tokenizer.decode(prompt.token_ids)
        return self._texts[index // self._n]

    def _logprobs(self, chunk: Chunk, before: str) -> dict[str, Any]:
        """Parallel lists; `text_offset` counts characters of prompt and answer, also over chunks.

        Nothing predicts the first token of a prompt: it has null for log-probabilities.
        """
        offset = self._offsets.setdefault(chunk.index, _Offset())
        token_ids: list[int] = []
        scores: list[Logprobs | None] = []
        starts: list[int] = []
        if chunk.prompt is not None:
            token_ids, scores = [*chunk.prompt.token_ids], [None, *chunk.prompt.scores]
            starts = offset.pass_over_prompt(before, [self._tokenizer.token_bytes(token_id) for token_id in token_ids])
        starts += [offset.pass_over(self._shown(token_id)) for token_id in chunk.token_ids]
        token_ids, scores = [*token_ids, *chunk.token_ids], [*scores, *chunk.logprobs]
        pairs = zip(token_ids, scores, strict=True)
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [None if one is None else one.chosen for one in scores],
            "top_logprobs": [None if one is None else self._tops(token_id, one) for token_id, one in pairs],
            "text_offset": starts,
        }

    def _tops(self, chosen: int, logprobs: Logprobs) -> dict[str, float]:
        """The best tokens and the chosen one by name; of tokens of one name all but the first have ids for names."""
        values = dict(logprobs.top) | {chosen: logprobs.chosen}
        names = {chosen: self._name(chosen)}
        for token_id in values:
            name = self._name(token_id)
            names.setdefault(token_id, f"token_id:{token_id}" if name in names.values() else name)
        return {names[token_id]: value for token_id, value in values.items()}

    def _name(self, token_id: int) -> str:
        """A token's text, or OpenAI's form of bytes that are a part of a character."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _shown(self, token_id: int) -> bytes:
        return b"" if self._tokenizer.is_special(token_id) else self._tokenizer.token_bytes(token_id)


class ChatForm(OpenAIForm):
    """Writes answers of POST /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, has_reasoning: bool = True) -> None:
        super().__init__(*args)
        self._has_reasoning = has_reasoning
        self._opened: set[int] = set()  # choices whose role was sent

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """The assistant's message, whole: without content if it has none but calls."""
        parts = self._parts(chunk)
        calls = [call_of(part) for part in parts if isinstance(part, CallPart)]
        content, reasoning = said_in(parts, "content") or (None if calls else ""), said_in(parts, "reasoning")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        return {"index": chunk.index, "message": message, **self._rest(chunk)}

    def deltas(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The message's next pieces; the first of a choice says the role, and the last of a chunk has its end."""
        found = [delta for part in self._parts(chunk) for delta in _deltas(part)]
        if not found and (chunk.finish_reason is not None or chunk.logprobs):
            found = [{"content": ""}]
        for number, delta in enumerate(found):
            role = {} if chunk.index in self._opened else {"role": "assistant"}
            self._opened.add(chunk.index)
            rest = {"logprobs": self._rest(chunk)["logprobs"] if number == 0 else None}
            rest["finish_reason"] = chunk.finish_reason if number == len(found) - 1 else None
            yield {"index": chunk.index, "delta": {**role, **delta}, **rest}

    def _parts(self, chunk: Chunk) -> list[Part]:
        return [part for part in parts_of(chunk) if self._has_reasoning or part[0] != "reasoning"]

    def _rest(self, chunk: Chunk) -> dict[str, Any]:
        entries = token_entries(self._tokenizer, chunk) if self._has_logprobs else None
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        return {"finish_reason": chunk.finish_reason, "logprobs": logprobs}


def parts_of(chunk: Chunk) -> list[Part]:
    """The parts of a chunk; a chunk that is not cut into parts is content."""
    if chunk.parts is None:
        return [AnswerText("content", chunk.text)] if chunk.text else []
    return chunk.parts


def token_entries(tokenizer: Tokenizer, chunk: Chunk) -> list[dict[str, Any]]:
    """A chunk's tokens with their log-probabilities and alternatives, in OpenAI's newer form."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
    return [
        entry(token_id, logprobs.chosen) | {"top_logprobs": [entry(*top) for top in logprobs.top]}
        for token_id, logprobs in pairs
    ]


def _deltas(part: Part) -> list[dict[str, Any]]:
    """The pieces of a part as a stream has them: a call's name first, and then its arguments."""
    if isinstance(part, AnswerText):
        return [{FIELDS[part.kind]: part.text}]
    begin = {"index": part.number, **call_of(part._replace(arguments=""))}
    return [
        {"tool_calls": [begin]},
        {"tool_calls": [{"index": part.number, "function": {"arguments": part.arguments}}]},
    ]


def _usage(progress: GenerationState) -> dict[str, Any]:
    return {
        "prompt_tokens": progress.num_prompt,
        "completion_tokens": progress.num_completion,
        "total_tokens": progress.num_tokens,
        "prompt_tokens_details": {"cached_tokens": progress.usage()["cached_tokens"]},
        "virtual_tokens": progress.usage()["virtual_tokens"],
    }
