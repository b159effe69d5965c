"""Uses OpenAI's client for Python as its README does, with most options that one meets."""

import sys

import openai

base_url, key, task = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key)

assert [model.id for model in client.models.list()] == ["base", task]
assert client.models.retrieve(task).id == task

completion = client.completions.create(model=task, prompt="Customer: «card arrival»\nIntent:", max_tokens=40)
assert completion.choices[0].text == "card arrival", completion
completion = client.completions.create(
    model=task,
    prompt=["Say «one»", "Say «two»"],
    temperature=0,
    top_p=1,
    seed=7,
    n=2,
    stop=["\n", "END"],
    logprobs=3,
    max_tokens=16,
    best_of=1,
    echo=False,
    suffix="",
    presence_penalty=0,
    frequency_penalty=0,
    logit_bias={"10": -100},
    user="customer-1",
)
assert [choice.text for choice in completion.choices] == ["one", "one", "two", "two"]
assert completion.choices[0].logprobs.tokens[:3] == ["o", "n", "e"]
pieces = client.completions.create(
    model=task, prompt=[60, 97, 62], max_tokens=30, stream=True, stream_options={"include_usage": True}
)
*pieces, last = pieces
assert "".join(piece.choices[0].text for piece in pieces) == "card arrival" and last.usage.completion_tokens == 13

turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say «héllo 🎩»"}]
chat = client.chat.completions.create(model=task, messages=turns)
assert chat.choices[0].message.content == "héllo 🎩" and chat.choices[0].finish_reason == "stop"
chat = client.chat.completions.create(
    model=task,
    messages=[
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "Say «yes»"}, {"type": "text", "text": " now"}]},
        chat.choices[0].message,
        {"role": "user", "content": "and «no»"},
    ],
    temperature=0.2,
    top_p=0.9,
    seed=7,
    n=2,
    stop="END",
    logprobs=True,
    top_logprobs=2,
    max_completion_tokens=16,
    metadata={"team": "a"},
    store=False,
    service_tier="auto",
    response_format={"type": "text"},
    parallel_tool_calls=True,
    tools=[],
    tool_choice="none",
    user="customer-1",
)
assert [choice.message.content for choice in chat.choices] == ["no", "no"]
assert [token.token for token in chat.choices[0].logprobs.content[:2]] == ["n", "o"]
chunks = client.chat.completions.create(
    model=task, messages=turns, stream=True, stream_options={"include_usage": True}, max_tokens=40
)
*chunks, last = chunks
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "héllo 🎩" and last.usage
with client.chat.completions.stream(model=task, messages=turns) as stream:
    assert stream.get_final_completion().choices[0].message.content == "héllo 🎩"

try:  # not served yet
    client.chat.completions.create(
        model=task,
        messages=turns,
        tools=[{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}],
    )
except openai.BadRequestError as error:
    assert error.param == "tools", error
client.chat.completions.create(model=task, messages=turns, response_format={"type": "json_object"})
echoed = client.completions.create(model=task, prompt="a b", echo=True, logprobs=1, max_tokens=1).choices[0]
assert echoed.text == "a bc" and echoed.logprobs.token_logprobs[0] is None, echoed
