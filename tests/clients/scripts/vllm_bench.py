"""Asks by the request functions of `vllm bench serve`, each with the fields that its options lead to."""

import asyncio
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import aiohttp

base_url, key, task = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key
# vLLM itself imports torch, and much more that its clients do not need.
path = Path(sysconfig.get_path("purelib")) / "vllm/benchmarks/lib/endpoint_request_func.py"
spec = importlib.util.spec_from_file_location("endpoint_request_func", path)
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)


async def ask(session: aiohttp.ClientSession, kind: str, route: str, prompt: object, **options: object) -> str:
    """Ask once, and return the text of an answer that the benchmark counts as one."""
    request = bench.RequestFuncInput(
        prompt=prompt, api_url=f"{base_url}/{route}", prompt_len=4, output_len=26, model=task, **options
    )
    output = await bench.ASYNC_REQUEST_FUNCS[kind](request, session)
    assert output.success and output.ttft > 0 and output.output_tokens, output
    return output.generated_text


async def main() -> None:
    """Ask in every way."""
    # What `--temperature`, `--top-p`, `--top-k`, `--min-p`, ... of the command become.
    sampling = {
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    extra = {**sampling, "repetition_penalty": 1.0, "seed": 7}
    async with aiohttp.ClientSession() as session:
        for kind in ("vllm", "openai"):
            assert await ask(session, kind, "completions", "Say «card arrival»") == "card arrival"
        await ask(session, "openai", "completions", "Say «card arrival»", logprobs=1, extra_body=extra)
        text = await ask(session, "openai", "completions", [60, 97, 62], ignore_eos=True, request_id="bench-1")
        assert text == "card arrival" * 2 + "ca", text
        assert await ask(session, "openai-chat", "chat/completions", "Say «yes»", extra_body=extra) == "yes"
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say «bye»"}]
        options = {"chat_messages": turns, "request_id": "bench-2", "extra_headers": {"X-Session": "1"}}
        assert await ask(session, "openai-chat", "chat/completions", "", **options) == "bye"
        async with session.get(f"{base_url}/models", headers={"Authorization": f"Bearer {key}"}) as answer:
            assert (await answer.json())["data"][-1]["id"] == task  # how the command finds the model


asyncio.run(main())
