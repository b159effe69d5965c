"""The output of OpenAI's responses: items made from the parts of an answer, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from adapters_store.tools.parser import AnswerText, CallPart, Part
from server.api.sse import Event

Item = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]


class Tell(Protocol):
    """Makes the next event of a stream."""

    def __call__(self, kind: str, /, **fields: Any) -> Event: ...


class TextKind(NamedTuple):
    """The form of an item with one text: the beginning of its id, its fields, and those of the text."""

    prefix: str
    item: Mapping[str, Any]
    text: Mapping[str, Any]
    has_logprobs: bool


KINDS = {
    "content": TextKind(
        "msg", {"type": "message", "role": "assistant"}, {"type": "output_text", "text": "", "annotations": []}, True
    ),
    "reasoning": TextKind("rs", {"type": "reasoning", "summary": []}, {"type": "reasoning_text", "text": ""}, False),
}


class OutputItems:
    """Items in the order of the answer's parts; the last one is open while more of its text may come.

    The log-probabilities of tokens go with the text of a message that comes next; those of reasoning and calls are
    dropped.
    """

    def __init__(self, request_id: str, tell: Tell) -> None:
        self.items: list[Item] = []
        self._request_id, self._tell = request_id, tell
        self._open: TextKind | None = None  # of the last item
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is yet to come

    def push(self, parts: Sequence[Part], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Yield the events of the answer's next parts."""
        self._logprobs += logprobs
        for part in parts:
            yield from (self._call(part) if isinstance(part, CallPart) else self._text(part))

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Yield the events of the open item, which is whole or cut; an output of no items gets an empty message."""
        content = KINDS["content"]
        if not self.items or (self._logprobs and self._open is content):
            yield from self._text(AnswerText("content", ""))
        yield from self._close(status)

    def cut(self) -> list[Item]:
        """The items of an answer that ends here, without events."""
        if self._open is not None:
            self.items[-1]["status"] = "incomplete"
        return self.items

    def _text(self, piece: AnswerText) -> Iterator[Event]:
        kind = KINDS[piece.kind]
        if self._open is not kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        logprobs, self._logprobs = self._logprobs, []
        text = self.items[-1]["content"][0]
        text["text"] += piece.text
        scores: dict[str, Any] = {}
        if kind.has_logprobs:
            scores = {"logprobs": logprobs}
            text["logprobs"] += logprobs
        if piece.text or logprobs:
            yield self._of_text(f"{text['type']}.delta", delta=piece.text, **scores)

    def _begin(self, kind: TextKind) -> Iterator[Event]:
        item = {"id": self._new_id(kind.prefix), **kind.item, "status": "in_progress"}
        self.items.append({**item, "content": [_empty(kind)]})
        self._open = kind
        yield self._of_item("added", {**item, "content": []})
        yield self._of_text("content_part.added", part=_empty(kind))

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        """End the open item, if there is one."""
        if self._open is None:
            return
        item = self.items[-1]
        item["status"], self._open, text = status, None, item["content"][0]
        told = {name: text[name] for name in ("text", "logprobs") if name in text}
        yield self._of_text(f"{text['type']}.done", **told)
        yield self._of_text("content_part.done", part=text)
        yield self._of_item("done", item)

    def _call(self, call: CallPart) -> Iterator[Event]:
        self._logprobs.clear()
        yield from self._close("completed")
        item = {"id": self._new_id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        self.items.append({**item, "arguments": call.arguments, "status": "completed"})
        yield self._of_item("added", {**item, "arguments": "", "status": "in_progress"})
        yield self._placed("function_call_arguments.delta", delta=call.arguments)
        yield self._placed("function_call_arguments.done", arguments=call.arguments)
        yield self._of_item("done", self.items[-1])

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._request_id}_{len(self.items)}"

    def _of_item(self, name: str, item: Item) -> Event:
        return self._tell(f"response.output_item.{name}", output_index=len(self.items) - 1, item=item)

    def _of_text(self, name: str, **fields: Any) -> Event:
        return self._placed(name, content_index=0, **fields)

    def _placed(self, name: str, **fields: Any) -> Event:
        """An event of a part of the last item."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self._tell(f"response.{name}", **place, **fields)


def _empty(kind: TextKind) -> dict[str, Any]:
    """A text to which nothing was said yet."""
    return {**kind.text, **({"logprobs": []} if kind.has_logprobs else {})}
