"""Tables of the pages, from the code itself: `python -m tests.readme` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from server.api.openai_fields import (
    CHAT,
    COMPLETION,
    FUNCTION_TOOL,
    INPUT_CALL,
    INPUT_MESSAGE,
    INPUT_REASONING,
    INPUT_RESULT,
    INPUT_TEXT,
    LOAD,
    MESSAGE,
    RESPONSES,
    STREAM_OPTIONS,
    STRUCTURED_OUTPUTS,
    TEXT_CONFIG,
    TEXT_GENERATION,
    TEXT_PART,
    UNLOAD,
    described,
)
from server.settings import Settings, flags_of, variable

DOCS = Path(__file__).parent.parent / "docs"
PLACES = {
    "completions": COMPLETION,
    "chat": CHAT,
    "a message": MESSAGE,
    "a part of its content": TEXT_PART,
    "`stream_options`": STREAM_OPTIONS,
    "`structured_outputs`": STRUCTURED_OUTPUTS,
    "responses": RESPONSES,
    "a message of `input`": INPUT_MESSAGE,
    "a call in `input`": INPUT_CALL,
    "a result in `input`": INPUT_RESULT,
    "reasoning in `input`": INPUT_REASONING,
    "a tool of responses": FUNCTION_TOOL,
    "a part of an item": INPUT_TEXT,
    "`text`": TEXT_CONFIG,
    "`load_lora_adapter`": LOAD,
    "`unload_lora_adapter`": UNLOAD,
    "LoRAX and TGI": TEXT_GENERATION,
}
VARYING = {"cache": "`~/.cache/manyhats`", "num_threads": "the cores"}


def settings_table() -> str:
    """A Markdown table: flag, default, meaning."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = "(variable only)" if name == "admin_key" else " ".join(f"`{flag}`" for flag in flags_of(name, field))
        default = field.get_default(call_default_factory=True)
        shown = default.human_readable() if hasattr(default, "human_readable") else default
        said = VARYING.get(name, "-" if shown in (None, "") else f"`{shown}`")
        lines.append(f"| {flag} `{variable(name)}` | {said} | {field.description} |")
    return "\n".join(lines) + "\n"


def fields_table() -> str:
    """A Markdown table of fields that are not served: by the values that ask for nothing, where each may stand."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, fields in PLACES.items():
        for name, values in fields.items():
            places.setdefault((name, described(values)), []).append(place)
    lines = ["| field | taken values | in |", "|---|---|---|"]
    for (name, taken), where in sorted(places.items()):
        shown = ", ".join(f"`{value}`" for value in taken.split(", "))
        lines.append(f"| `{name}` | {shown} | {', '.join(where)} |")
    return "\n".join(lines) + "\n"


def _write(page: str, name: str, table: str) -> None:
    text = (DOCS / page).read_text()
    new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + table + m[2], text, flags=re.DOTALL)
    (DOCS / page).write_text(new)


if __name__ == "__main__":
    _write("settings.md", "settings", settings_table())
    _write("api.md", "fields", fields_table())
