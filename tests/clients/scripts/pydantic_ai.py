"""Uses pydantic-ai's agents: whole, streamed, with a history, and with outputs that are not served yet."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, PromptedOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
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

for output, field in (
    (Customer, "tool_choice"),
    (NativeOutput(Customer), "response_format"),
    (PromptedOutput(Customer), "response_format"),
):
    try:  # not served yet
        Agent(model, output_type=output).run_sync('Say «{"name": "Ann"}»')
    except ModelHTTPError as error:
        assert field in str(error), error
