"""Uses Hugging Face's `InferenceClient` over a server in OpenAI's form, and in that of TGI."""

import asyncio
import json
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient

base_url, key, task = sys.argv[1:]
turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say «card arrival»"}]

client = InferenceClient(base_url=base_url, api_key=key)
answer = client.chat_completion(turns, model=task, max_tokens=32)
assert answer.choices[0].message.content == "card arrival" and answer.usage.completion_tokens == 13, answer
answer = client.chat.completions.create(
    model=task,
    messages=[*turns, answer.choices[0].message, {"role": "user", "content": "Say «bye»"}],
    temperature=0.5,
    top_p=0.9,
    seed=7,
    n=2,
    stop=["\n", "END"],
    logprobs=True,
    top_logprobs=2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    max_tokens=32,
    extra_body={"top_k": 20},
)
assert [choice.message.content for choice in answer.choices] == ["bye", "bye"]
stream = client.chat.completions.create(
    model=task, messages=turns, stream=True, stream_options={"include_usage": True}, max_tokens=32
)
*chunks, last = stream
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "card arrival" and last.usage, last


async def ask() -> str:
    """Ask by the client that is asynchronous."""
    async with AsyncInferenceClient(base_url=base_url, api_key=key) as client:
        chunks = await client.chat_completion(turns, model=task, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


assert asyncio.run(ask()) == "card arrival"

CALL = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
find = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
turns = [{"role": "user", "content": f"Say «{CALL}»"}]
message = client.chat_completion(turns, model=task, tools=[find], tool_choice="auto").choices[0].message
(call,) = message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"name": "Ann"}), message
result = {"role": "tool", "tool_call_id": call.id, "content": "Say «here»"}
answer = client.chat_completion([*turns, message, result], model=task, tools=[find])
assert answer.choices[0].message.content == "here"
chunks = list(client.chat_completion(turns, model=task, tools=[find], tool_choice="required", stream=True))
calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
assert calls[0].function.name == "find"
assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"name": "Ann"}
schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
turns = [{"role": "user", "content": 'Say «{"name": "Ann"}»'}]
for form in (
    {"type": "json_schema", "json_schema": {"name": "card", "schema": schema, "strict": True}},
    {"type": "json_object"},
):
    answer = client.chat_completion(turns, model=task, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"name": "Ann"}

native = InferenceClient(base_url.removesuffix("/v1"), token=key)
prompt = "Say «card arrival»"
assert native.text_generation(prompt, adapter_id=task, max_new_tokens=32) == "card arrival"
details = native.text_generation(prompt, adapter_id=task, max_new_tokens=32, details=True, do_sample=True, seed=7)
assert (details.generated_text, details.details.finish_reason) == ("card arrival", "eos_token"), details
pieces = list(native.text_generation(prompt, adapter_id=task, max_new_tokens=32, stream=True, details=True))
assert "".join(piece.token.text for piece in pieces if not piece.token.special) == "card arrival"
assert pieces[-1].generated_text == "card arrival" and pieces[-1].details.generated_tokens == 13
