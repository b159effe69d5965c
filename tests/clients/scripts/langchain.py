"""Uses LangChain's chat model and its older text model: whole, streamed, several at once, bound to stops and tools,
and with answers that are objects."""

import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

base_url, key, task = sys.argv[1:]

model = ChatOpenAI(model=task, base_url=base_url, api_key=key)
answer = model.invoke("Say «card arrival»")
assert answer.content == "card arrival" and answer.usage_metadata["output_tokens"] == 13, answer
chain = ChatPromptTemplate.from_messages([("system", "Answer in {tongue}."), ("human", "Say «{text}»")]) | model
assert (chain | StrOutputParser()).invoke({"tongue": "French", "text": "bonjour"}) == "bonjour"
assert [one.content for one in model.batch(["Say «one»", "Say «two»"])] == ["one", "two"]
assert "".join(chunk.content for chunk in model.stream("Say «héllo»")) == "héllo"
turns = [SystemMessage("Be brief."), HumanMessage("Hi", name="ann"), AIMessage("Hello"), HumanMessage("Say «bye»")]
assert model.invoke(turns).content == "bye"
assert model.bind(stop=["\n", "END"]).invoke(turns).content == "bye"

model = ChatOpenAI(
    model=task,
    base_url=base_url,
    api_key=key,
    temperature=0,
    max_tokens=32,
    max_retries=1,
    top_p=0.9,
    seed=7,
    n=1,
    logprobs=True,
    top_logprobs=2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    stream_usage=True,
    extra_body={"top_k": 20},
)
answer = model.invoke(turns)
assert answer.content == "bye" and len(answer.response_metadata["logprobs"]["content"]) == 4
chunks = list(model.stream(turns))
assert "".join(chunk.content for chunk in chunks) == "bye"
assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 4

text = OpenAI(model=task, base_url=base_url, api_key=key, temperature=0, max_tokens=32)
assert text.invoke("Say «card arrival»") == "card arrival"
assert "".join(text.stream("Say «card arrival»", stop=["\n"])) == "card arrival"
text = OpenAI(model=task, base_url=base_url, api_key=key, n=2, seed=7)
assert [[one.text for one in each] for each in text.generate(["Say «a»", "Say «b»"]).generations] == [
    ["a"] * 2,
    ["b"] * 2,
]


@tool
def find(name: str) -> str:
    """Find a customer."""
    return name


model = ChatOpenAI(model=task, base_url=base_url, api_key=key, temperature=0)
CALL = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
turns = [HumanMessage(f"Say «{CALL}»")]
for choice in (None, "any", "find"):
    answer = model.bind_tools([find], tool_choice=choice).invoke(turns)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("find", {"name": "Ann"})], answer
bound = model.bind_tools([find], parallel_tool_calls=False)
(call,) = answer.tool_calls
assert bound.invoke([*turns, answer, ToolMessage("Say «here»", tool_call_id=call["id"])]).content == "here"
chunks = list(bound.stream(turns))
whole = chunks[0]
for chunk in chunks[1:]:
    whole += chunk
assert whole.tool_calls[0]["args"] == {"name": "Ann"}


class Customer(BaseModel):
    """A customer, as the answer describes one."""

    name: str
    age: int


ANN = '{"name": "Ann", "age": 7}'
CALLED = f'Say «<tool_call>{{"name": "Customer", "arguments": {ANN}}}</tool_call>»'
for method, question in (("json_schema", f"Say «{ANN}»"), ("json_mode", f"Say «{ANN}»"), ("function_calling", CALLED)):
    structured = model.with_structured_output(Customer, method=method)
    assert structured.invoke(question) == Customer(name="Ann", age=7), method
assert list(model.with_structured_output(Customer).stream(f"Say «{ANN}»"))[-1].age == 7
dialogue = ChatOpenAI(model=task, base_url=base_url, api_key=key, use_responses_api=True)
assert dialogue.invoke("Say «card arrival»").text == "card arrival"
assert "".join(chunk.text for chunk in dialogue.stream("Say «héllo»")) == "héllo"
