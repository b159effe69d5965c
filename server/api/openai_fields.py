"""Documented fields of the dialects' requests that are not served, each with the values that ask for nothing.

Clients send them all the time. Such a value is taken; any other would be ignored in silence, and is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from server.schemas import Strict

Values = tuple[Any, ...]  # values of JSON; a type stands for each of its values
Fields = Mapping[str, Values]

_OPENAI: Fields = {
    "audio": (),
    "function_call": ("none", "auto"),  # without functions there is none to call
    "functions": ([],),
    "metadata": (dict,),  # belongs to what is stored
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (str,),  # a hint: the prefix cache finds equal beginnings without it
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "safety_identifier": (str,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_VLLM: Fields = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "early_stopping": (False,),
    "ec_transfer_params": ({},),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_mm_kwargs": (True,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (str,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
COMPLETION: Fields = {
    **_VLLM,
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}
CHAT: Fields = {
    **_VLLM,
    **_OPENAI,
    "echo": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_prompt_text": (False,),
}
TURN_FIELDS = (  # of vLLM, which say how turns are written
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
MESSAGE: Fields = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (str,),  # templates know roles, and no names
    "provider_specific_fields": (dict,),  # LiteLLM's own notes, in answers that come back
    "reasoning": ("",),
    "refusal": ("",),
}
TEXT_PART: Fields = {"prompt_cache_breakpoint": ()}
STREAM_OPTIONS: Fields = {"include_obfuscation": (False,)}
STRUCTURED_OUTPUTS: Fields = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (bool,),  # there is none but a space after a comma or a colon
    "disable_fallback": (bool,),  # there is none
    "structural_tag": (),
    "whitespace_pattern": (),
}
TOKENIZE: Fields = {name: CHAT[name] for name in TURN_FIELDS}
LOAD: Fields = {"base_model_name": (), "is_3d_lora_weight": (False,)}  # of vLLM
UNLOAD: Fields = {"lora_int_id": ()}
TEXT_GENERATION: Fields = {  # of LoRAX and TGI
    "adapter_source": ("hub", "local"),  # adapters are uploaded: none is fetched for a request
    "api_token": (str,),  # to fetch with
    "apply_chat_template": (False,),
    "best_of": (1,),
    "merged_adapters": (),
    "truncate": (),
    "typical_p": (1.0,),
    "watermark": (False,),
}
RESPONSES: Fields = {
    "access_programs": (),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),  # a state, as what `previous_response_id` names
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": (str,),
    "prompt_cache_options": _OPENAI["prompt_cache_options"],
    "prompt_cache_retention": _OPENAI["prompt_cache_retention"],
    "reasoning": ({}, {"effort": "none"}),
    "safety_identifier": (str,),
    "service_tier": _OPENAI["service_tier"],
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
INPUT_MESSAGE: Fields = {"id": (str,), "phase": (str,), "status": (str,)}  # of an answer that comes back
INPUT_CALL: Fields = {
    "async": (False,),
    "caller": ({"type": "direct"},),
    "id": (str,),
    "namespace": (),
    "status": (str,),
}
INPUT_RESULT: Fields = {
    "caller": ({"type": "direct"},),
    "id": (str,),
    "name": (str,),  # that of the call counts
    "namespace": (),
    "status": (str,),
}
INPUT_REASONING: Fields = {"encrypted_content": ("",), "id": (str,), "status": (str,)}
FUNCTION_TOOL: Fields = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}
INPUT_TEXT: Fields = {"annotations": ([],), "logprobs": (list,), "prompt_cache_breakpoint": ()}
TEXT_CONFIG: Fields = {"verbosity": ("medium",)}
_ALL = (
    CHAT, COMPLETION, MESSAGE, TEXT_PART, STREAM_OPTIONS, STRUCTURED_OUTPUTS, LOAD, UNLOAD,
    TEXT_GENERATION, RESPONSES, INPUT_MESSAGE, INPUT_CALL, INPUT_RESULT, INPUT_REASONING, FUNCTION_TOOL, INPUT_TEXT,
    TEXT_CONFIG,
)  # fmt: skip


class Tolerant(Strict):
    """A strict model that takes nulls, and the values of `neutral` fields, as if they were not there."""

    neutral: ClassVar[Fields] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and not cls._is_neutral(name, value)}

    @classmethod
    def _is_neutral(cls, name: str, value: Any) -> bool:
        return name not in cls.model_fields and any(_matches(value, one) for one in cls.neutral.get(name, ()))

    @classmethod
    def unknown(cls, field: str) -> str:
        """Refuse a field; say which values of it would be taken if it is documented."""
        name = field.rpartition(".")[2]
        known = [fields[name] for fields in (cls.neutral, *_ALL) if name in fields]
        if not known:
            return super().unknown(field)
        return f"{field} is not served with this value: leave it out, or send {described(known[0])}"


def _matches(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or of the wanted type. JSON's true is no number."""
    if isinstance(wanted, type):
        return isinstance(value, wanted)
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def described(values: Values) -> str:
    """List values of a field for people, as JSON."""
    kinds = {bool: "true or false", dict: "any object", list: "any list", str: "any text"}
    return ", ".join(["null", *(kinds[one] if isinstance(one, type) else json.dumps(one) for one in values)])
