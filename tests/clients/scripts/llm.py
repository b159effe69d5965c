"""Uses the command `llm` with models that its file `extra-openai-models.yaml` names, as its manual says."""

import os
import subprocess
import sys
from pathlib import Path

base_url, key, task = sys.argv[1:]
home = Path.cwd() / "llm"
home.mkdir()
(home / "extra-openai-models.yaml").write_text(
    f"""
- model_id: chat
  model_name: {task}
  api_base: {base_url}
  supports_tools: true
  supports_schema: true
- model_id: text
  model_name: {task}
  api_base: {base_url}
  completion: true
"""
)
environment = {**os.environ, "LLM_USER_PATH": str(home), "OPENAI_API_KEY": key}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as from a shell."""
    command = [sys.executable, "-m", "llm", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def ask(*arguments: str) -> str:
    """Ask by the command, which must succeed."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


options = []
for option in ("temperature 0.5", "max_tokens 32", "top_p 0.9", "frequency_penalty 0.1", "seed 7", "stop END"):
    options += ["-o", *option.split()]
assert ask("-m", "chat", "Say «card arrival»") == "card arrival"
assert ask("-m", "chat", "--no-stream", "-s", "Be brief.", "Say «héllo»") == "héllo"
assert ask("-m", "chat", "-c", "Say «bye»", *options) == "bye"  # goes on with what was said before
assert ask("-m", "text", "Say «yes»") == "yes"
assert ask("-m", "text", "--no-stream", "Say «yes»", "-o", "max_tokens", "8", "-o", "temperature", "0") == "yes"

call = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>'
find = 'def find(name: str) -> str:\n    """Find a customer."""\n    return f"Say «{name} is here»"'
assert ask("-m", "chat", "--no-stream", f"Say «{call}»", "--functions", find) == "Ann is here"
assert ask("-m", "chat", f"Say «{call}»", "--functions", find) == "Ann is here"
ann = '{"name": "Ann", "age": 7}'
assert ask("-m", "chat", "--no-stream", f"Say «{ann}»", "--schema", "name, age int") == ann
