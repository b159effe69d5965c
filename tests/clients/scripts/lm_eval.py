"""Runs the command `lm_eval` with a small task of its own, by completions and by chat."""

import json
import os
import subprocess
import sys
from pathlib import Path

base_url, key, task = sys.argv[1:]
rows = [{"question": f"Say «{text}»", "answer": text} for text in ("card arrival", "lost card")]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
shared = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {Path("rows.jsonl").resolve()}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
Path("tasks").mkdir()
Path("tasks/generate.yaml").write_text(
    f"""task: intents
output_type: generate_until
{shared}
generation_kwargs: {{until: ["\\n"], max_gen_toks: 32, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)
Path("tasks/choose.yaml").write_text(
    f"""task: choices
output_type: multiple_choice
{shared}
doc_to_choice: ["card arrival", "lost card"]
"""
)


def run(model: str, route: str, name: str, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the command over one of the tasks."""
    arguments = (
        f"model={task},base_url={base_url}/{route},num_concurrent=1,max_retries=1,tokenizer={Path('base').resolve()}"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", name]
    command += ["--include_path", "tasks", "--output_path", out, *more]
    environment = {**os.environ, "OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("hf").resolve())}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def score(*arguments: str, metric: str = "exact_match") -> float:
    """Run a task that must succeed; the share of answers that are right."""
    done = run(*arguments)
    reports = list(Path(arguments[3]).rglob("results_*.json"))
    assert done.returncode == 0 and reports, done.stdout + done.stderr
    return json.loads(reports[0].read_text())["results"][arguments[2]][f"{metric},none"]


assert score("local-completions", "completions", "intents", "out-text") == 1.0
assert score("local-completions", "completions", "intents", "out-batch", "--batch_size", "2") == 1.0
assert score("local-chat-completions", "chat/completions", "intents", "out-chat", "--apply_chat_template") == 1.0
assert score("local-completions", "completions", "choices", "out-choices", metric="acc") == 0.5  # the shorter one
