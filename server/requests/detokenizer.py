"""Turn a stream of tokens into a stream of text.

`tokenizers.DecodeStream` does not serve here: it waits for ever behind bytes that are no character, has no end at which
they are given out, and raises if a token changes how the one before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters_store.tools.source import overlap
from server.requests.tokenizer import REPLACEMENT, Tokenizer

MAX_CHARACTER_BYTES = 4
NUM_CONTEXT = 8  # tokens of the prompt that an answer is decoded behind
MAX_HELD_TOKENS = 32  # bytes that never become a character are given up after so many tokens


class TextStream:
    """Turns tokens into text as they come: whole characters only, and never a part of a stop text.

    Tokens are decoded in a short window behind the last whole character, so that a long answer costs no more per token
    than a short one. The first window is the end of `prompt`: a word that an answer begins with keeps the space before
    it, which tokenizers strip from the beginning of a text. A `lead` that an answer begins with is taken off. Special
    tokens have no text but those of `shown`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: list[str],
        prompt: Sequence[int] = (),
        lead: str = "",
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._stop, self._shown = tokenizer, stop, shown or {}
        self._window = self._context(prompt)  # tokens since the one before the last that was read
        self._num_read = len(self._window)  # how many of the window are in the text already
        self._lead = lead  # until it is known whether the answer begins with it
        self._held = ""  # text that may be the beginning of the lead, or of a stop text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token. Sets `is_stopped` once a stop text is complete."""
        if token_id in self._shown:
            text = self._rest() + self._shown[token_id]
            self._window = self._context(self._window)  # what comes goes on with no character before the token
            self._num_read = len(self._window)
            return self._release(text)
        if self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        before = self._tokenizer.decode(self._window[: self._num_read])
        after = self._tokenizer.decode(self._window)
        end = len(self._window)
        if after.endswith(REPLACEMENT):
            if end - self._num_read < MAX_HELD_TOKENS:
                return ""
            end = self._last_whole(after)
            after = self._tokenizer.decode(self._window[:end])
        self._window, self._num_read = self._window[self._num_read :], end - self._num_read
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """The text that was held back, at the end of the answer."""
        text = self._release(self._rest())
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _rest(self) -> str:
        """The text of the tokens that are not read yet, whole characters or not."""
        before = self._tokenizer.decode(self._window[: self._num_read])
        rest = self._tokenizer.decode(self._window)[len(before) :]
        self._num_read = len(self._window)
        return rest

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that have a text, without a character that the prompt ends within."""
        shown = [token for token in prompt[-2 * NUM_CONTEXT :] if not self._tokenizer.is_special(token)]
        context = shown[-NUM_CONTEXT:]
        while context and self._tokenizer.decode(context).endswith(REPLACEMENT):
            context.pop()
        return context

    def _last_whole(self, text: str) -> int:
        """The index at which the window can be cut, so that the possible beginning of a character stays behind."""
        window, decode = self._window, self._tokenizer.decode
        cuts = range(len(window) - MAX_CHARACTER_BYTES + 1, len(window))
        return next((cut for cut in cuts if decode(window[:cut]) + decode(window[cut:]) == text), len(window))

    def _release(self, text: str) -> str:
        text = self._held + text
        if len(text) < len(self._lead) and self._lead.startswith(text):
            self._held = text
            return ""
        text, self._lead = text.removeprefix(self._lead), ""
        ends = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)[0]]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
