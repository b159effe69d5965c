"""Uses outlines over servers in OpenAI's form and in vLLM's: plain text, and forms that are not served yet."""

import sys
from typing import Literal

import openai
import outlines
from pydantic import BaseModel

base_url, key, task = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key)


class Customer(BaseModel):
    """A customer, as the answer describes one."""

    name: str


for model in (outlines.from_openai(client, task), outlines.from_vllm(client, task)):
    assert model("Say «card arrival»") == "card arrival"
    assert model("Say «bye»", max_tokens=16, temperature=0.5, seed=7, top_p=0.9, stop=["\n"]) == "bye"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say «bye»"}]
    assert model(outlines.inputs.Chat(turns)) == "bye"
    assert "".join(model.stream("Say «héllo»")) == "héllo"

for model, form, field in (
    (outlines.from_openai(client, task), Customer, "response_format"),
    (outlines.from_vllm(client, task), Customer, "structured_outputs"),
    (outlines.from_vllm(client, task), Literal["yes", "no"], "structured_outputs"),
):
    try:  # not served yet
        model('Say «{"name": "Ann"}»', form)
    except Exception as error:  # noqa: BLE001 - outlines wraps it in errors of its own
        assert field in str(error), error
