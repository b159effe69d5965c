"""Runs lm-evaluation-harness over task files of its own, by completions, by chat, and by scores of given choices."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import json

import lm_eval
from lm_eval.tasks import TaskManager

base_url, key, task = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key
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
ours = TaskManager(include_path="tasks", include_defaults=False)  # without its own: it reads thousands


def scores(model: str, route: str, *names: str, **options: object) -> dict[str, float]:
    """Run tasks; the share of answers that are right in each."""
    told = lm_eval.simple_evaluate(
        model=model,
        model_args={
            "model": task,
            "base_url": f"{base_url}/{route}",
            "max_retries": 1,
            "tokenizer": str(Path("base").resolve()),
        },
        tasks=[*names],
        task_manager=ours,
        bootstrap_iters=0,
        **options,
    )
    return {
        name: told["results"][name].get("exact_match,none", told["results"][name].get("acc,none")) for name in names
    }


# The fake engine gives each token the same score: the shorter choice is the likelier one.
assert scores("local-completions", "completions", "intents", "choices") == {"intents": 1.0, "choices": 0.5}
assert scores("local-completions", "completions", "intents", batch_size=2) == {"intents": 1.0}
assert scores("local-chat-completions", "chat/completions", "intents", apply_chat_template=True) == {"intents": 1.0}
