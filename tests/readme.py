"""The table of docs/settings.md, from the settings themselves: `python -m tests.readme` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from server.settings import Settings, flags_of, variable

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
VARYING = {"cache": "`~/.cache/manyhats`", "num_threads": "the cores"}


def settings_table() -> str:
    """A Markdown table: flag, default, meaning."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = "(variable only)" if name == "admin_key" else " ".join(f"`{flag}`" for flag in flags_of(name, field))
        default = field.get_default(call_default_factory=True)
        shown = default.human_readable() if hasattr(default, "human_readable") else default
        said = VARYING.get(name, "-" if shown is None else f"`{shown}`")
        lines.append(f"| {flag} `{variable(name)}` | {said} | {field.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    new = re.sub(
        r"(<!-- settings -->\n).*?(<!-- /settings -->)", lambda m: m[1] + settings_table() + m[2], text, flags=re.DOTALL
    )
    PAGE.write_text(new)
