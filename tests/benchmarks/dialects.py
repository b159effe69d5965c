"""How each kind of server is asked for tokens, and how its answer is read: one class a kind."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.workload import Prompted

Event = dict[str, Any]


class IncompleteAnswerError(Exception):
    """The server did not answer in full; its figures would be of no worth."""


class Dialect:
    """What all kinds have in common: a stream of events, each with some tokens, that must come to `max_tokens`."""

    error = IncompleteAnswerError

    def request(self, request: Prompted, task: str, limit_s: float) -> dict[str, Any]:
        """Arguments of `aiohttp.ClientSession.post`."""
        raise NotImplementedError

    def size(self, event: Event) -> int:
        """Tokens of an event."""
        raise NotImplementedError

    def is_piece(self, event: Event) -> bool:
        """Whether an event is a part of the answer, not only its end."""
        return self.size(event) > 0

    def check(self, request: Prompted, events: list[Event], is_done: bool) -> None:
        """Raise `IncompleteAnswerError` unless all tokens came."""
        raise NotImplementedError

    def short(self, request: Prompted, num_tokens: int | None, last: Event) -> IncompleteAnswerError:
        """The error of an answer that lacks tokens."""
        return self.error(f"{num_tokens} of {request.max_tokens} tokens came; the last event was {last}")


class Manyhats(Dialect):
    """Our own `/generate`."""

    def request(self, request: Prompted, task: str, limit_s: float) -> dict[str, Any]:
        """See `Dialect`."""
        body = {
            "prompt_token_ids": request.prompt,
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "timeout_s": limit_s,
        }
        return {"url": "/generate", "params": {"task": task}, "json": body}

    def size(self, event: Event) -> int:
        """See `Dialect`."""
        return len(event.get("token_ids", ()))

    def is_piece(self, _event: Event) -> bool:
        """Every event has text, the last may have what was held back."""
        return True

    def check(self, request: Prompted, events: list[Event], is_done: bool) -> None:
        """All tokens, and as many virtual ones before them as the adapter has."""
        last = events[-1] if events else {}
        usage = last.get("usage", {})
        num_tokens, num_virtual = usage.get("completion_tokens"), usage.get("virtual_tokens", 0)
        if not is_done or num_tokens != request.max_tokens:
            raise self.short(request, num_tokens, last)
        if num_virtual != request.num_virtual:
            raise self.error(f"{num_virtual} virtual tokens came before it instead of {request.num_virtual}")


class Llama(Dialect):
    """llama-server's `/completion`. It applies every adapter that the request does not give a scale of 0."""

    def __init__(self, num_adapters: int) -> None:
        self.num_adapters = num_adapters

    def request(self, request: Prompted, _task: str, _limit_s: float) -> dict[str, Any]:
        """See `Dialect`."""
        scales = [{"id": one, "scale": float(one == request.adapter)} for one in range(self.num_adapters)]
        body = {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,  # no two requests begin alike
            "lora": scales,
        }
        return {"url": "/completion", "json": body}

    def size(self, event: Event) -> int:
        """See `Dialect`."""
        return len(event.get("tokens", ()))

    def check(self, request: Prompted, events: list[Event], _is_done: bool) -> None:
        """The last event says that it is the last, and how many tokens there were."""
        last = events[-1] if events else {}
        if not last.get("stop") or last.get("tokens_predicted") != request.max_tokens:
            raise self.short(request, last.get("tokens_predicted"), {k: last[k] for k in ("error",) if k in last})
        if not any(map(self.is_piece, events)):
            raise self.error("no event had tokens")


class OpenAI(Dialect):
    """`/v1/completions`, as vLLM has it: an adapter is a model's name."""

    def request(self, request: Prompted, task: str, _limit_s: float) -> dict[str, Any]:
        """See `Dialect`."""
        body = {
            "model": task,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        return {"url": "/v1/completions", "json": body}

    def size(self, event: Event) -> int:
        """See `Dialect`."""
        return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))

    def check(self, request: Prompted, events: list[Event], is_done: bool) -> None:
        """The usage in the last event counts all tokens."""
        last = events[-1] if events else {}
        num_tokens = (last.get("usage") or {}).get("completion_tokens")
        if not is_done or num_tokens != request.max_tokens or not any(map(self.is_piece, events)):
            raise self.short(request, num_tokens, last)
