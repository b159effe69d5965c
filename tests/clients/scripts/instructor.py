"""Uses instructor to get objects by text alone, by tools, and by forms of answers."""

import sys

import instructor
import openai
from pydantic import BaseModel

base_url, key, task = sys.argv[1:]
ANN = 'Say «{"name": "Ann", "age": 7}»'


class Customer(BaseModel):
    """A customer, as the answer describes one."""

    name: str
    age: int


def client_of(mode: instructor.Mode) -> instructor.Instructor:
    """Make a client that asks for objects in a mode."""
    return instructor.from_openai(openai.OpenAI(base_url=base_url, api_key=key), mode=mode)


client = client_of(instructor.Mode.MD_JSON)
turns = [{"role": "user", "content": ANN}]
found = client.chat.completions.create(model=task, messages=turns, response_model=Customer)
assert (found.name, found.age) == ("Ann", 7)
found, whole = client.create_with_completion(
    model=task, messages=turns, response_model=Customer, temperature=0, seed=7, max_tokens=128, max_retries=2
)
assert found.name == "Ann" and whole.usage.completion_tokens == 26, whole
partial = client.create_partial(model=task, messages=turns, response_model=Customer, stream=True)
assert list(partial)[-1].age == 7
plain = client.chat.completions.create(model=task, messages=turns, response_model=None)
assert plain.choices[0].message.content == '{"name": "Ann", "age": 7}'

CALLED = 'Say «<tool_call>{"name": "Customer", "arguments": {"name": "Ann", "age": 7}}</tool_call>»'
for mode, question in (
    (instructor.Mode.TOOLS, CALLED),
    (instructor.Mode.TOOLS_STRICT, CALLED),
    (instructor.Mode.JSON, ANN),
    (instructor.Mode.JSON_SCHEMA, ANN),
):
    client, turns = client_of(mode), [{"role": "user", "content": question}]
    found = client.create(model=task, messages=turns, response_model=Customer, max_retries=0)
    assert (found.name, found.age) == ("Ann", 7), mode
    turns = [{"role": "user", "content": question.replace("Customer", "PartialCustomer")}]  # as instructor names it
    partial = client.create_partial(model=task, messages=turns, response_model=Customer)
    assert list(partial)[-1].age == 7, mode
