"""Uses LlamaIndex's `OpenAILike`, as a chat model and as a text model."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

base_url, key, task = sys.argv[1:]
turns = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Say «card arrival»")]

chat = OpenAILike(model=task, api_base=base_url, api_key=key, is_chat_model=True, context_window=4096)
assert chat.chat(turns).message.content == "card arrival"
assert chat.complete("Say «yes»").text == "yes"
assert "".join(piece.delta or "" for piece in chat.stream_chat(turns)) == "card arrival"
assert "".join(piece.delta or "" for piece in chat.stream_complete("Say «héllo»")) == "héllo"
chat = OpenAILike(
    model=task,
    api_base=base_url,
    api_key=key,
    is_chat_model=True,
    temperature=0.0,
    max_tokens=32,
    logprobs=True,
    top_logprobs=2,
    additional_kwargs={"seed": 7, "stop": ["\n"], "top_p": 0.9},
)
answer = chat.chat([*turns, chat.chat(turns).message, ChatMessage(role="user", content="Say «bye»")])
assert answer.message.content == "bye" and len(answer.logprobs) == 4, answer

text = OpenAILike(model=task, api_base=base_url, api_key=key, is_chat_model=False, max_tokens=16, temperature=0.0)
assert text.complete("Say «yes»", stop=["\n"]).text == "yes"
assert "".join(piece.delta or "" for piece in text.stream_complete("Say «yes»")) == "yes"
