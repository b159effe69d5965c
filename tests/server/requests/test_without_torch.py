"""The API process has a tokenizer without the models that transformers would import beside it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.requests.tokenizer import Tokenizer
from server.requests.without_torch import _hidden

ALONE = """
import importlib.util, json, sys, torch
from pathlib import Path
from server.requests.tokenizer import Tokenizer
find_spec = importlib.util.find_spec
tokenizer = Tokenizer(Path(sys.argv[1]))
chat = tokenizer.turns.render([("user", "Say hello.")], None)
told = tokenizer.encode("Hats, 🎩 for all"), tokenizer.turns.encode(chat)
assert sys.modules["torch"] is torch and torch.ones(1).sum() == 1
assert importlib.util.find_spec is find_spec
print(json.dumps([*told, tokenizer.decode(told[0]), "torch._dynamo" in sys.modules]))
"""


def test_a_tokenizer_brings_no_models(real_base: Path) -> None:
    """A process of its own has the tokens and the chat template, and imports nothing of torch's compiler."""
    told = subprocess.run([sys.executable, "-c", ALONE, str(real_base)], capture_output=True, text=True, check=True)
    here = Tokenizer(real_base)
    tokens = here.encode("Hats, 🎩 for all")
    chat = here.turns.encode(here.turns.render([("user", "Say hello.")], None))
    assert json.loads(told.stdout) == [tokens, chat, here.decode(tokens), False]
    assert "PyTorch" not in told.stderr


def test_other_threads_find_torch_meanwhile() -> None:
    """The package is hidden from the importing thread alone, and is found again afterwards, also after an error."""
    seen: list[bool] = []
    with pytest.raises(RuntimeError), _hidden("torch"):
        other = threading.Thread(target=lambda: seen.append(importlib.util.find_spec("torch") is not None))
        other.start()
        other.join()
        assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("json") is not None
        raise RuntimeError
    assert seen == [True] and importlib.util.find_spec("torch") is not None
