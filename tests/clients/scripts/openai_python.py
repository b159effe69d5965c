"""Uses OpenAI's client for Python as its README does, with most options that one meets."""

import json
import sys

import openai
from pydantic import BaseModel

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

# Tools: a call, its result, a stream, a call that must be, and Pydantic models.
CALL = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
tools = [{"type": "function", "function": {"name": "find", "description": "Find a customer", "parameters": schema}}]
turns = [{"role": "user", "content": f"Say «{CALL}»"}]
message = client.chat.completions.create(model=task, messages=turns, tools=tools).choices[0].message
(call,) = message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"name": "Ann"}), message
result = {"role": "tool", "tool_call_id": call.id, "content": "Say «she is here»"}
chat = client.chat.completions.create(model=task, messages=[*turns, message, result], tools=tools)
assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("she is here", "stop")
with client.chat.completions.stream(model=task, messages=turns, tools=tools, tool_choice="required") as stream:
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"name": "Ann"}
named = {"type": "function", "function": {"name": "find"}}
chat = client.chat.completions.create(
    model=task, messages=turns, tools=tools, tool_choice=named, parallel_tool_calls=False
)
assert chat.choices[0].finish_reason in ("tool_calls", "stop") and chat.choices[0].message.tool_calls


class Customer(BaseModel):
    """A customer, as an answer describes one, or as a function takes one."""

    name: str
    age: int | None


ANN = '{"name": "Ann", "age": 7}'
turns = [{"role": "user", "content": f"Say «{ANN}»"}]
parsed = client.chat.completions.parse(model=task, messages=turns, response_format=Customer)
assert parsed.choices[0].message.parsed == Customer(name="Ann", age=7)
with client.chat.completions.stream(model=task, messages=turns, response_format=Customer) as stream:
    assert stream.get_final_completion().choices[0].message.parsed.age == 7
parsed = client.chat.completions.parse(
    model=task,
    messages=[{"role": "user", "content": f'Say «<tool_call>{{"name": "Customer", "arguments": {ANN}}}</tool_call>»'}],
    tools=[openai.pydantic_function_tool(Customer)],
)
assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments.name == "Ann"
client.chat.completions.create(model=task, messages=turns, response_format={"type": "json_object"})
choices = {"structured_outputs": {"choice": ["yes", "no"]}}
client.completions.create(model=task, prompt="Say «no»", max_tokens=8, extra_body=choices)

response = client.responses.create(model=task, instructions="Be brief.", input="Say «card arrival»")
assert (response.output_text, response.status, response.usage.output_tokens) == ("card arrival", "completed", 13)
response = client.responses.create(
    model=task,
    input=[{"role": "user", "content": "Hi"}, *response.output, {"role": "user", "content": "Say «bye»"}],
    temperature=0.2,
    top_p=0.9,
    max_output_tokens=16,
    include=["message.output_text.logprobs"],
    top_logprobs=2,
    metadata={"team": "a"},
    store=False,
)
assert response.output_text == "bye" and len(response.output[0].content[0].logprobs[0].top_logprobs) == 2
assert client.responses.parse(model=task, input=f"Say «{ANN}»", text_format=Customer).output_parsed.age == 7
with client.responses.stream(model=task, input="Say «héllo»") as stream:
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == "héllo" == stream.get_final_response().output_text

# Tools over responses: a call, its result, a stream of one that must be, and a Pydantic model.
flat = [{"type": "function", **tools[0]["function"]}]
asked = [{"role": "user", "content": f"Say «{CALL}»"}]
response = client.responses.create(model=task, input=asked, tools=flat)
(call,) = response.output
assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "find", {"name": "Ann"}), response
result = {"type": "function_call_output", "call_id": call.call_id, "output": "Say «she is here»"}
response = client.responses.create(model=task, input=[*asked, *response.output, result], tools=flat)
assert (response.output_text, response.status) == ("she is here", "completed")
with client.responses.stream(model=task, input=asked, tools=flat, tool_choice="required") as stream:
    text = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
    assert json.loads(text) == {"name": "Ann"} == json.loads(stream.get_final_response().output[0].arguments)
response = client.responses.parse(
    model=task,
    input=f'Say «<tool_call>{{"name": "Customer", "arguments": {ANN}}}</tool_call>»',
    tools=[openai.pydantic_function_tool(Customer)],
    tool_choice={"type": "function", "name": "Customer"},
)
assert response.output[0].parsed_arguments.name == "Ann"

# Scores of a text that is given.
echoed = client.completions.create(model=task, prompt="a b", echo=True, logprobs=1, max_tokens=1).choices[0]
assert echoed.text == "a bc" and echoed.logprobs.token_logprobs[0] is None, echoed
echoed = client.completions.create(model=task, prompt=[[97, 32, 98], [97, 98]], echo=True, logprobs=0, max_tokens=0)
assert [choice.text for choice in echoed.choices] == ["a b", "ab"] and not echoed.usage.completion_tokens
