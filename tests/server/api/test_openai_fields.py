"""Strict by meaning: a documented field whose value asks for nothing is taken, every other value of it is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from huggingface_hub import TextGenerationInputGenerateParameters
from msgspec.structs import replace
from openai.types import completion_create_params as legacy
from openai.types.chat import chat_completion_content_part_text_param as parts
from openai.types.chat import chat_completion_message_param as turns
from openai.types.chat import chat_completion_stream_options_param as options
from openai.types.chat import completion_create_params as chat
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseFunctionToolCallParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputTextParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
)
from openai.types.responses import response_create_params as responses
from openai.types.responses import response_input_item_param as items

from server.api import openai_fields
from server.api.openai import ChatRequest, CompletionRequest, StreamOptions
from server.api.openai_fields import Tolerant
from server.api.responses import ResponsesRequest, TextConfig
from server.api.responses_input import (
    FunctionCallItem,
    FunctionCallOutput,
    FunctionTool,
    InputMessage,
    InputText,
    ReasoningItem,
)
from server.api.structured_outputs import StructuredOutputs
from server.api.text_generation import TextGenerationParameters
from server.api.tool_fields import ChatMessage, TextPart
from tests.readme import fields_table
from tests.server.world import Site, error_of, serve_site

pytestmark = pytest.mark.anyio

# vLLM's requests with their defaults, recorded from its commit 002032ee (2026): it has no wheel that is small.
VLLM: dict[str, Any] = {
    "use_beam_search": False,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "watermarking": None,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "echo": False,
    "structured_outputs": None,
    "response_format": None,
    "priority": 0,
    "request_id": None,
    "session_id": None,
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "routed_experts_prompt_start": 0,
    "return_token_offsets": False,
    "return_mm_kwargs": True,
    "cache_salt": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "vllm_xargs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
    "stream_interval": None,
}
VLLM_COMPLETION: dict[str, Any] = {**VLLM, "add_special_tokens": True, "prompt_embeds": None}
VLLM_CHAT: dict[str, Any] = {
    **VLLM,
    "top_logprobs": 0,
    "logprobs": False,
    "tool_choice": "none",
    "include_reasoning": True,
    "parallel_tool_calls": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "media_io_kwargs": None,
    "mm_processor_kwargs": None,
    "return_prompt_text": None,
}
LORAX = {  # what LoRAX's requests have besides TGI's, from its commit 018d6ff (2024)
    "adapter_source", "api_token", "apply_chat_template", "ignore_eos_token", "merged_adapters", "response_format",
    "return_k_alternatives",
}  # fmt: skip
PROBES: list[Any] = [True, False, 7, -7, 0.5, "x", "", "high", ["x"], [], {"x": "y"}, {"type": "json_object"}, {}]
TURN: dict[str, Any] = {"role": "assistant", "content": "hi"}
ASKED: dict[str, Any] = {"model": "base", "seed": 1, "max_tokens": 2}
CHAT: dict[str, Any] = {**ASKED, "messages": [TURN]}
RESPONSE: dict[str, Any] = {"model": "base", "seed": 1, "max_output_tokens": 2, "input": "a"}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c", "output": "x"}
COMPLETIONS_PATH, CHAT_PATH, RESPONSES_PATH = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BODIES: dict[type[Tolerant], tuple[str, Any]] = {  # where a model stands in a request
    CompletionRequest: (COMPLETIONS_PATH, lambda fields: {**ASKED, "prompt": "a", **fields}),
    ChatRequest: (CHAT_PATH, lambda fields: CHAT | fields),
    ChatMessage: (CHAT_PATH, lambda fields: CHAT | {"messages": [TURN | fields]}),
    TextPart: (
        CHAT_PATH,
        lambda fields: CHAT | {"messages": [{**TURN, "content": [{"type": "text", "text": "hi", **fields}]}]},
    ),
    StreamOptions: (CHAT_PATH, lambda fields: CHAT | {"stream_options": fields}),
    ResponsesRequest: (RESPONSES_PATH, lambda fields: RESPONSE | fields),
    InputMessage: (RESPONSES_PATH, lambda fields: RESPONSE | {"input": [TURN | fields]}),
    InputText: (
        RESPONSES_PATH,
        lambda fields: RESPONSE | {"input": [{**TURN, "content": [{"type": "output_text", "text": "hi", **fields}]}]},
    ),
    FunctionCallItem: (RESPONSES_PATH, lambda fields: RESPONSE | {"input": [CALL | fields]}),
    FunctionCallOutput: (RESPONSES_PATH, lambda fields: RESPONSE | {"input": [CALL, RESULT | fields]}),
    ReasoningItem: (RESPONSES_PATH, lambda fields: RESPONSE | {"input": [{"type": "reasoning", **fields}]}),
    FunctionTool: (
        RESPONSES_PATH,
        lambda fields: RESPONSE | {"tools": [{"type": "function", "name": "f", **fields}]},
    ),
    TextConfig: (RESPONSES_PATH, lambda fields: RESPONSE | {"text": fields}),
    TextGenerationParameters: ("/generate", lambda fields: {"inputs": "a", "parameters": {"seed": 1} | fields}),
    StructuredOutputs: (CHAT_PATH, lambda fields: CHAT | {"structured_outputs": {"regex": "a", **fields}}),
}


def names(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in get_type_hints(kind)}


DOCUMENTED: dict[type[Tolerant], set[str]] = {
    CompletionRequest: names(*get_args(legacy.CompletionCreateParams)) | VLLM_COMPLETION.keys(),
    ChatRequest: names(*get_args(chat.CompletionCreateParams)) | VLLM_CHAT.keys(),
    ChatMessage: names(*get_args(turns.ChatCompletionMessageParam))
    | {"annotations", "reasoning", "reasoning_content"}
    | {"provider_specific_fields"},  # of LiteLLM
    TextPart: names(parts.ChatCompletionContentPartTextParam),
    StreamOptions: names(options.ChatCompletionStreamOptionsParam) | {"continuous_usage_stats"},
    StructuredOutputs: {"json_", "regex", "choice", "grammar", "json_object", *openai_fields.STRUCTURED_OUTPUTS},
    ResponsesRequest: names(*get_args(responses.ResponseCreateParams)),
    InputMessage: names(EasyInputMessageParam, ResponseOutputMessageParam),
    InputText: names(ResponseInputTextParam, ResponseOutputTextParam),
    FunctionCallItem: names(ResponseFunctionToolCallParam),
    FunctionCallOutput: names(items.FunctionCallOutput),
    ReasoningItem: names(ResponseReasoningItemParam),
    FunctionTool: names(FunctionToolParam),
    TextConfig: names(ResponseTextConfigParam),
    TextGenerationParameters: names(TextGenerationInputGenerateParameters) | LORAX,
}
UNSERVED = [(model, name) for model in DOCUMENTED for name in sorted(model.neutral)]


@pytest.fixture(scope="module")
async def server(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server on loopback, which writes tools in a format."""
    async with serve_site(tiny_base, tmp_path_factory.mktemp("fields"), tool_format="hermes") as site:
        yield site


@pytest.mark.parametrize("model", DOCUMENTED)
def test_every_documented_field_is_known(model: type[Tolerant]) -> None:
    """Every field of the official client's own types and of vLLM's requests is served or in the table, never both."""
    served, unserved = set(model.model_fields), set(model.neutral)
    assert not served & unserved
    assert DOCUMENTED[model] <= served | unserved, DOCUMENTED[model] - served - unserved
    assert served | unserved <= DOCUMENTED[model] | served | OLDER_OR_OTHER, unserved - DOCUMENTED[model]


# Of vLLM before 0.10 and of text-completion clients that send OpenAI's fields to both routes.
OLDER_OR_OTHER = {"early_stopping", "logits_processors", *(name for name in openai_fields.CHAT if "guided" in name)}


async def submitted(server: Site, model: type[Tolerant], fields: dict[str, Any]) -> Any:
    """What the engine is asked for by a request with these fields, which must be taken."""
    path, body = BODIES[model]
    answer = await server.post(path, body(fields))
    assert answer.status_code == 200, answer.text
    return replace(server.engine.submitted[-1], sequence_id="", deadline=0, arrived=0)


def neutral_values(values: tuple[Any, ...]) -> list[Any]:
    """Null, every value of a table's entry, and for a type some of its values."""
    some: dict[Any, list[Any]] = {bool: [True, False], str: ["", "x"], dict: [{}, {"x": "y"}], list: [[], ["x"]]}
    return [None, *(value for one in values for value in (some[one] if isinstance(one, type) else [one]))]


@pytest.mark.parametrize(("model", "name"), UNSERVED)
async def test_a_value_that_asks_for_nothing(server: Site, model: type[Tolerant], name: str) -> None:
    """Such a value is taken and changes nothing; every other is refused by the field's name, and told what is taken."""
    plain, taken = await submitted(server, model, {}), neutral_values(model.neutral[name])
    for value in taken:
        assert await submitted(server, model, {name: value}) == plain, value
    path, body = BODIES[model]
    others = [probe for probe in PROBES if not any(openai_fields._matches(probe, one) for one in model.neutral[name])]
    assert others
    for value in others:
        answer = await server.post(path, body({name: value}))
        error = error_of(answer)
        status = 400 if path.startswith("/v1/") else 422
        assert (answer.status_code, (error["param"] or "").rpartition(".")[2]) == (status, name), (value, error)
        assert "null" in error["message"], error


@pytest.mark.parametrize(("model", "defaults"), [(CompletionRequest, VLLM_COMPLETION), (ChatRequest, VLLM_CHAT)])
async def test_defaults_of_vllm(server: Site, model: type[Tolerant], defaults: dict[str, Any]) -> None:
    """The defaults of vLLM, all at once and written out, ask for nothing; neither does -1 of top_k."""
    plain = await submitted(server, model, {})
    assert await submitted(server, model, defaults) == plain
    assert await submitted(server, model, {"top_k": -1}) == plain


async def test_what_nobody_documents(server: Site) -> None:
    """A field that no dialect has is refused as unknown, whatever its value."""
    values: list[Any] = [False, [], "x"]
    for value in values:
        answer = await server.post("/v1/completions", {"model": "base", "prompt": "a", "nonsense": value})
        assert (answer.status_code, error_of(answer)["message"]) == (400, "unknown field nonsense")


async def test_generate_stays_strict(server: Site) -> None:
    """The route /generate takes none of these fields, whatever the value."""
    answer = await server.post("/generate?task=base", {"prompt": "a", "store": False})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "store")


def test_the_page_has_the_table() -> None:
    """The page of the API lists every such field with what is taken (`python -m tests.readme` writes it)."""
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    assert page.partition("<!-- fields -->\n")[2].partition("<!-- /fields -->")[0] == fields_table()
