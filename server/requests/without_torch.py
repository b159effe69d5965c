"""Import transformers as on a machine without torch: a tokenizer needs none of its models.

With torch, transformers imports all that models may need: 90 MB of memory and 1.3 s of a start, for nothing here. It
asks once whether torch is installed, by `importlib.util.find_spec`, and remembers the answer for the life of the
process. So this is the one place that answers for it: while transformers is imported, `find_spec` says "not installed"
of torch, to the importing thread alone. No module is removed, and other threads may import torch meanwhile.

The API process computes nothing with transformers' models; whoever needs them must import transformers before this.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_LOCK = threading.Lock()  # one thread at a time replaces `find_spec`, and puts it back


def import_transformers() -> ModuleType:
    """The package transformers; without torch, unless it was imported with torch before."""
    with _LOCK:
        if "transformers" not in sys.modules:
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
            with _hidden("torch"):
                import_module("transformers").is_torch_available()  # it asks now, and remembers
    return import_module("transformers")


@contextmanager
def _hidden(hidden: str) -> Iterator[None]:
    """Let this thread find no package of that name while the block runs."""
    find_spec, thread = importlib.util.find_spec, threading.get_ident()

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == hidden and threading.get_ident() == thread else find_spec(name, package)

    importlib.util.find_spec = find
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec
