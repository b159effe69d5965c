"""Uses AutoGen's client for OpenAI, alone, in a team of two agents, and with a tool."""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import AssistantMessage, SystemMessage, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient

base_url, key, task = sys.argv[1:]
INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown"}


def find(name: str) -> str:
    """Find a customer."""
    return f"Say «{name} is here»"


async def main() -> None:
    """Ask in every way."""
    client = OpenAIChatCompletionClient(model=task, base_url=base_url, api_key=key, model_info=INFO)
    turns = [SystemMessage(content="Be brief."), UserMessage(content="Say «card arrival»", source="ann")]
    answer = await client.create(turns)
    assert answer.content == "card arrival" and answer.usage.completion_tokens == 13, answer
    turns += [AssistantMessage(content=answer.content, source="agent"), UserMessage(content="Say «bye»", source="ann")]
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 32,
        "stop": ["\n"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = await client.create(turns, extra_create_args={**options, "frequency_penalty": 0.1, "user": "customer-1"})
    assert answer.content == "bye" and len(answer.logprobs) == 4, answer
    *pieces, last = [piece async for piece in client.create_stream(turns)]
    assert "".join(pieces) == last.content == "bye"
    agents = [AssistantAgent(name, model_client=client, model_client_stream=True) for name in ("first", "second")]
    team = RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(3))
    assert [one.content for one in (await team.run(task="Say «yes»")).messages if one.source == "first"][-1] == "yes"
    agent = AssistantAgent("finder", model_client=client, tools=[find], reflect_on_tool_use=True)
    call = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
    assert (await agent.run(task=f"Say «{call}»")).messages[-1].content == "Ann is here"
    assert (await client.create(turns, json_output=True)).content == "bye"


asyncio.run(main())
