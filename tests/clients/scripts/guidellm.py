"""Runs the command `guidellm run` over both routes, with a file of prompts."""

import json
import subprocess
import sys
from pathlib import Path

base_url, key, task = sys.argv[1:]
target = base_url.removesuffix("/v1")
rows = [{"prompt": "Say «card arrival»", "output_tokens_count": 24}, {"prompt": "Say «bye»", "output_tokens_count": 8}]
Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: str, backend: dict[str, object], data: str, *more: str) -> None:
    """Run a benchmark of two requests, of which none may fail."""
    backend = {"kind": "openai_http", "target": target, "api_key": key, "model": task, **backend}
    Path(folder).mkdir()
    command = [sys.executable, "-m", "guidellm", "run", "--backend", json.dumps(backend), "--data", data]
    command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=2", *more]
    done = subprocess.run([*command, "--disable-console-interactive"], cwd=folder, capture_output=True, text=True)
    report = Path(folder) / "benchmarks.json"
    assert done.returncode == 0 and report.exists(), done.stdout + done.stderr
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (2, 0), totals


prompts = f"kind=json_file,path={Path('data.jsonl').resolve()}"
tokenizer = ("--tokenizer", f"kind=huggingface_auto,model={Path('base').resolve()}")
run("chat", {}, prompts, *tokenizer)
run("completions", {"request_format": "/v1/completions"}, prompts, *tokenizer)
