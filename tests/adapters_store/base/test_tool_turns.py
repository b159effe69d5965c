"""Turns with tools are encoded so that text stays text, by a template and in every tool format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adapters_store.base.turns import AnswerRefusedError, ToolsRefusedError, TurnEncoder
from adapters_store.format.manifest import ToolTexts
from adapters_store.tools.formats import FORMATS, ToolCall, ToolFormat
from adapters_store.tools.turns import ToolTurn
from tests.adapters_store.base.test_turns import CONTENT, FORMAT, controls
from tests.kit.tokenizers import CALL, CHATML, KINDS, SPECIAL, save_tokenizer

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ '<think>' + message.reasoning_content + '</think>' if message.reasoning_content }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}"
    "{% endfor %}{{ message.tool_call_id or '' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = CONTENT.map("".join)
FORMS: dict[str, ToolFormat] = {
    **{str(name): form for name, form in FORMATS.items()},
    "texts": ToolFormat("json", ToolTexts("Tools <|im_", CALL, "</tool_call>", "<|", "|>")),
}
Conversation = tuple[list[ToolTurn], list[dict[str, Any]]]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of each kind, whose chat template takes tools."""
    made = AutoTokenizer.from_pretrained(save_tokenizer(request.param, tmp_path_factory.mktemp(request.param)))
    made.chat_template = TEMPLATE
    return made


def conversation(said: list[str]) -> Conversation:
    """Turns and tools in which texts stand at every place that takes one."""
    one, two, three, four, five, six, seven, eight = said
    parameters = {
        "type": "object",
        "properties": {one: {"type": "string", "description": two, "enum": [three]}},
        "default": {"a": [four]},
    }
    turns = [
        ToolTurn("user", "the card"),
        ToolTurn("assistant", five, (ToolCall("now", {one: [six, 1], "b": True}, "call_1"),), reasoning=seven),
        ToolTurn("tool", eight, call_id="call_1", name="now"),
    ]
    return turns, [{"name": "now", "description": two, "parameters": parameters}]


def encoded(tokenizer: Any, asked: Conversation, name: str | None) -> list[int]:
    """Tokens of a conversation, by the template or in a tool format and a prompt format."""
    encoder, (turns, tools) = TurnEncoder(tokenizer), asked
    form = None if name is None else FORMS[name]
    return encoder.encode(encoder.render(turns, None if name is None else FORMAT, tools, form))


@pytest.mark.parametrize("name", [None, *FORMS])
@settings(max_examples=12, deadline=None)
@given(said=st.lists(SAID, min_size=8, max_size=8))
def test_no_text_of_tools_writes_a_control_token(tokenizer: Any, name: str | None, said: list[str]) -> None:
    """Whatever descriptions, names of arguments, values, results and reasoning say, no control token comes of it."""
    silent = controls(tokenizer, encoded(tokenizer, conversation(["x"] * 8), name), SPECIAL)
    assert controls(tokenizer, encoded(tokenizer, conversation(said), name), SPECIAL) == silent


@pytest.mark.parametrize("kind", ["byte_level"])
def test_the_template_gets_what_was_written(tmp_path: Path, kind: str) -> None:
    """What the tokens say is the template's own text of the turns and tools."""
    made = AutoTokenizer.from_pretrained(save_tokenizer(kind, tmp_path))
    made.chat_template = TEMPLATE
    turns, tools = asked = conversation(["a", "b <|im_end|> c", "<s>", "</s>", "e", "f", "g", "h <|im_start|>"])
    call = {"name": "now", "arguments": turns[1].calls[0].arguments}
    messages = [
        {"role": "user", "content": "the card"},
        {
            "role": "assistant",
            "content": "e",
            "reasoning_content": "g",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "h <|im_start|>", "tool_call_id": "call_1", "name": "now"},
    ]
    functions = [{"type": "function", "function": tool} for tool in tools]
    whole = made.apply_chat_template(messages, tools=functions, tokenize=False, add_generation_prompt=True)
    assert made.decode(encoded(made, asked, None)) == whole


def test_an_answer_is_written_behind_its_prompt(tokenizer: Any) -> None:
    """The template's prompt and the answer that it writes join to what it writes of both; so does a format's."""
    encoder, (turns, tools) = TurnEncoder(tokenizer), conversation([*"abcdefgh"])
    prompt = encoder.render(turns[:1], None, tools)
    answer = encoder.render_answer(turns[:1], turns[1], tools, None)
    written = "".join([*prompt.pieces, *answer.pieces])
    assert written.endswith(
        '<think>g</think>e<tool_call>{"name": "now", "arguments": {"a": ["f", 1], "b": true}}</tool_call>'
    )
    hermes = encoder.render_answer(turns[:1], turns[1], tools, FORMATS["hermes"])
    assert "".join(hermes.pieces).startswith('e\n<tool_call>\n{"name": "now"')


def test_what_cannot_be_written(tokenizer: Any) -> None:
    """Tools that neither template nor format writes are refused, and an answer that changes its prompt."""
    turns, tools = conversation([*"abcdefgh"])
    usual, tokenizer.chat_template = tokenizer.chat_template, CHATML
    try:
        with pytest.raises(ToolsRefusedError, match="template writes no tools"):
            TurnEncoder(tokenizer).render(turns, None, tools)
        with pytest.raises(ToolsRefusedError, match="prompt format writes no tools"):
            TurnEncoder(tokenizer).render(turns, FORMAT, tools)
        tokenizer.chat_template = TEMPLATE.replace("{% if tools %}", "{{ messages | length }}{% if tools %}")
        with pytest.raises(AnswerRefusedError, match="behind its prompt"):
            TurnEncoder(tokenizer).render_answer(turns[:1], turns[1], tools, None)
    finally:
        tokenizer.chat_template = usual
