"""The plain text around a prompt: one string on the command line, a role's text in the manifest, never Jinja."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.format.manifest import Around, PromptFormat
from training.errors import OptionError

_PROMPT, _COMPLETION = "{prompt}", "{completion}"


@dataclass(frozen=True)
class Template:
    """Text around a row: `before` + prompt + `after`, then `lead` + completion.

    `lead` is the space ahead of an answer, which belongs to its first token.
    """

    before: str = ""
    after: str = ""
    lead: str = ""

    @property
    def is_plain(self) -> bool:
        return self == Template()

    def check_filled(self, columns: Iterable[str]) -> None:
        """Raise `OptionError` if a column is named in braces: only prompt and completion are filled in."""
        around = self.before + self.after + self.lead
        if name := next((name for name in columns if f"{{{name}}}" in around), None):
            raise OptionError(
                f"--template has {{{name}}}, a column that it does not fill in: it fills in {_PROMPT} and "
                f"{_COMPLETION}, which --prompt-column and --completion-column name."
            )

    def completion(self, text: str) -> str:
        return self.lead + text

    def prompt_format(self) -> PromptFormat:
        """Return the manifest's format: a user's message becomes the very prompt of training, others end a line."""
        line = Around(after="\n")
        return PromptFormat(system=line, user=Around(self.before, self.after), assistant=line, lead=self.lead)


def parse_template(text: str) -> Template:
    """Read `Customer: {prompt}\\nIntent: {completion}`. Without `{completion}` it follows the text directly.

    The spaces before `{completion}` go to the completion, for tokenizers join them to the word that follows.
    `\\n` and `\\t`, as a shell passes them, are a line's end and a tab. Raises `OptionError`.
    """
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    if text.count(_PROMPT) != 1:
        raise OptionError(f"--template must hold {_PROMPT} once, not {text.count(_PROMPT)} times: {text!r}.")
    before, rest = text.split(_PROMPT)
    if _COMPLETION not in rest:
        if _COMPLETION in before:
            raise OptionError(f"--template has {_COMPLETION} before {_PROMPT}: {text!r}.")
        return Template(before, rest)
    after, tail = rest.split(_COMPLETION, 1)
    if tail:
        raise OptionError(f"--template must end with {_COMPLETION}: after it comes only the end of the answer.")
    stripped = after.rstrip(" ")
    return Template(before, stripped, after[len(stripped) :])
