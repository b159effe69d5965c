"""Uses pydantic-ai's agents: whole, streamed, with a history, with tools, and with outputs that are objects."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

base_url, key, task = sys.argv[1:]
model = OpenAIChatModel(task, provider=OpenAIProvider(base_url=base_url, api_key=key))


class Customer(BaseModel):
    """A customer, as the answer describes one."""

    name: str


agent = Agent(model, system_prompt="Be brief.")
first = agent.run_sync("Say «card arrival»")
assert first.output == "card arrival" and first.usage.output_tokens == 13, first
settings = ModelSettings(
    temperature=0.5,
    top_p=0.9,
    seed=7,
    max_tokens=32,
    stop_sequences=["\n", "END"],
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={"10": -100},
    parallel_tool_calls=False,
    extra_body={"top_k": 20},
)
again = agent.run_sync("Say «bye»", message_history=first.all_messages(), model_settings=settings)
assert again.output == "bye"
again = Agent(model, instructions="Be brief.").run_sync("Say «bye»", message_history=first.all_messages())
assert again.output == "bye"


async def stream() -> str:
    """Read an answer as it comes."""
    async with agent.run_stream("Say «héllo»") as answer:
        return "".join([piece async for piece in answer.stream_text(delta=True)])


assert asyncio.run(stream()) == "héllo"

ANN = '{"name": "Ann"}'
CALLED = f'Say «<tool_call>{{"name": "final_result", "arguments": {ANN}}}</tool_call>»'
for output, question in (
    (Customer, CALLED),
    (ToolOutput(Customer), CALLED),
    (NativeOutput(Customer), f"Say «{ANN}»"),
    (PromptedOutput(Customer), f"Say «{ANN}»"),
):
    assert Agent(model, output_type=output).run_sync(question).output == Customer(name="Ann")

agent = Agent(model, instructions="Be brief.")


@agent.tool_plain
def find(name: str) -> str:
    """Find a customer."""
    return f"Say «{name} is here»"


FIND = f'Say «<tool_call>{{"name": "find", "arguments": {ANN}}}</tool_call>»'
assert agent.run_sync(FIND).output == "Ann is here"


async def stream_with_tools() -> str:
    """Read the answer that follows a call."""
    async with agent.run_stream(FIND) as answer:
        return await answer.get_output()


assert asyncio.run(stream_with_tools()) == "Ann is here"
dialogue = OpenAIResponsesModel(task, provider=OpenAIProvider(base_url=base_url, api_key=key))
assert Agent(dialogue, instructions="Be brief.").run_sync("Say «bye»").output == "bye"
assert Agent(dialogue, output_type=NativeOutput(Customer)).run_sync(f"Say «{ANN}»").output.name == "Ann"
