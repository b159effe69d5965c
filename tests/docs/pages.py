"""The Markdown pages of the repository, and what is in them: blocks of code with their markers, code words, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
AT_THE_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
EXAMPLES = ROOT / "adapters_store/examples/README.md"
PAGES = [*(ROOT / name for name in AT_THE_ROOT), *sorted((ROOT / "docs").glob("*.md")), EXAMPLES]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
MARKER = re.compile(r"<!-- (run by|not run|file): (.*) -->")
SHELL = "sh"


@dataclass(frozen=True)
class Block:
    """A fenced block of code: `kind` and `said` are those of the comment in the line before it, empty without one."""

    page: str
    line: int
    language: str
    text: str
    kind: str
    said: str

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """Yield the fenced blocks of every page, in order."""
    for page, text in TEXTS.items():
        lines = text.splitlines()
        fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
        assert len(fences) % 2 == 0, f"{page} has a fence that does not end"
        for first, last in zip(fences[::2], fences[1::2], strict=True):
            marker = MARKER.fullmatch(lines[first - 1].strip())
            kind, said = marker.groups() if marker else ("", "")
            body = "\n".join(lines[first + 1 : last])
            yield Block(page, first + 1, lines[first].strip().removeprefix("```"), body, kind, said)


def shell_blocks() -> list[Block]:
    """List the blocks that a reader pastes into a shell."""
    return [block for block in blocks() if block.language == SHELL]


def prose(page: str) -> str:
    """Return a page without its blocks of code and comments."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def code_words(page: str) -> list[str]:
    """List what stands in backticks in a page's prose, line breaks as spaces."""
    return [" ".join(word.split()) for word in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: str) -> list[str]:
    """List the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule: lower case, words joined by dashes."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
