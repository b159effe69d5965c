"""Uses Hugging Face's `InferenceClient` over a server in OpenAI's form."""

import asyncio
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

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

find = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
schema = {"type": "json_schema", "json_schema": {"name": "card", "schema": {"type": "object"}, "strict": True}}
for field, value in (("tools", [find]), ("response_format", schema)):
    try:  # not served yet
        client.chat_completion(turns, model=task, **{field: value})
    except HfHubHTTPError as error:
        assert field in str(error), error
