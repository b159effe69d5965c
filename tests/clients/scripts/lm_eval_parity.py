"""Runs lm-evaluation-harness over adapters twice: by its `hf` model with PEFT, and through a server.

It runs in the environment of `make test-clients`; `python -m tests.clients.lm_eval_parity` calls it.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

base_url, base, tasks, *adapters = sys.argv[1:]  # each adapter as NAME=FOLDER, the base itself as base=
manager = TaskManager(include_path=tasks, include_defaults=False)


def run(kind: str, /, **arguments: object) -> dict[str, object]:
    """Run the task: its accuracy, and each choice's log-likelihood with whether it is the greedy one."""
    told = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["intents"], task_manager=manager, bootstrap_iters=0, batch_size=1
    )
    samples = sorted(told["samples"]["intents"], key=lambda sample: sample["doc_id"])
    return {
        "acc": told["results"]["intents"]["acc,none"],
        "choices": [
            [float(logprob), str(greedy) == "True"] for one in samples for logprob, greedy in one["filtered_resps"]
        ],
    }


told = {}
for adapter in adapters:
    name, _, folder = adapter.partition("=")
    peft = {"peft": folder} if folder else {}
    told[name] = {
        "hf": run("hf", pretrained=base, dtype="float32", device="cpu", **peft),
        "served": run("local-completions", model=name, base_url=f"{base_url}/v1/completions", tokenizer=base),
    }
Path("told.json").write_text(json.dumps(told))
