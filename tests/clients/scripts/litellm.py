"""Uses LiteLLM's `completion` and `text_completion` with its provider for servers in OpenAI's form."""

import asyncio
import json
import sys

import litellm
from pydantic import BaseModel

base_url, key, task = sys.argv[1:]
common = {"model": f"openai/{task}", "api_base": base_url, "api_key": key}
turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say «card arrival»"}]

answer = litellm.completion(messages=turns, **common)
assert answer.choices[0].message.content == "card arrival" and answer.usage.completion_tokens == 13, answer
answer = litellm.completion(
    messages=turns,
    temperature=0,
    top_p=0.9,
    n=2,
    seed=7,
    stop=["\n", "END"],
    max_tokens=32,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logprobs=True,
    top_logprobs=2,
    user="customer-1",
    response_format={"type": "text"},
    **common,
)
assert [choice.message.content for choice in answer.choices] == ["card arrival"] * 2
# An answer of LiteLLM goes back as a turn as it is.
turns += [answer.choices[0].message.model_dump(), {"role": "user", "content": "Say «bye»"}]
assert litellm.completion(messages=turns, max_completion_tokens=8, **common).choices[0].message.content == "bye"
chunks = list(litellm.completion(messages=turns, stream=True, stream_options={"include_usage": True}, **common))
assert litellm.stream_chunk_builder(chunks).choices[0].message.content == "bye"
answer = asyncio.run(litellm.acompletion(messages=turns, **common))
assert answer.choices[0].message.content == "bye"
batch = litellm.batch_completion(messages=[turns[:2], turns], **common)
assert [one.choices[0].message.content for one in batch] == ["card arrival", "bye"]

text = {**common, "model": f"text-completion-openai/{task}"}
answer = litellm.text_completion(prompt="Say «yes»", max_tokens=8, temperature=0, logprobs=2, **text)
assert answer.choices[0].text == "yes", answer
chunks = list(litellm.text_completion(prompt="Say «yes»", stream=True, **text))
assert "".join(chunk.choices[0].text or "" for chunk in chunks) == "yes"
hosted = litellm.completion(messages=turns, top_k=20, **{**common, "model": f"hosted_vllm/{task}"})
assert hosted.choices[0].message.content == "bye"

CALL = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
find = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
turns = [{"role": "user", "content": f"Say «{CALL}»"}]
message = litellm.completion(messages=turns, tools=[find], tool_choice="auto", **common).choices[0].message
(call,) = message.tool_calls
assert json.loads(call.function.arguments) == {"name": "Ann"}, message
result = {"role": "tool", "tool_call_id": call.id, "name": "find", "content": "Say «here»"}
answer = litellm.completion(messages=[*turns, message, result], tools=[find], **common)
assert answer.choices[0].message.content == "here"
chunks = list(litellm.completion(messages=turns, tools=[find], tool_choice="required", stream=True, **common))
message = litellm.stream_chunk_builder(chunks).choices[0].message
(call,) = message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"name": "Ann"})
result["tool_call_id"] = call.id
answer = litellm.completion(messages=[*turns, message, result], tools=[find], **common)
assert answer.choices[0].message.content == "here"


class Customer(BaseModel):
    """A customer, as the answer describes one."""

    name: str


turns = [{"role": "user", "content": 'Say «{"name": "Ann"}»'}]
for form in (Customer, {"type": "json_object"}):
    answer = litellm.completion(messages=turns, response_format=form, **common)
    assert json.loads(answer.choices[0].message.content) == {"name": "Ann"}
