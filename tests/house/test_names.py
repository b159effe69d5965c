"""A name stands for one thing, and the words that the code has given up stay away."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.house.sources import PACKAGES, files, name_of, nodes

WORDS = {  # a part of an identifier -> what this code says for it
    "hat": "adapter",
    "hats": "adapters",
    "wear": "use",
    "wears": "uses",
    "worn": "row adapters, or used",
    "dress": "set_batch",
    "bank": "slots",
    "bury": "delete_if_unreferenced",
    "buried": "deleted",
    "taker": "TensorPool",
    "manner": "AttentionParams",
    "errand": "prefetch",
    "errands": "prefetch",
    "beside": "extras",
    "relatives": "lora_variants",
    "kin": "residual_lora",
    "unproved": "unvalidated",
}
NAMES = {  # a whole identifier -> what this code says for it
    "Answer": "GenerationState",
    "Bill": "UsageMeter",
    "Branch": "LowRankUpdate",
    "Direct": "DirectForward",
    "Front": "ServerState and its services",
    "Fuser": "LayerFuser",
    "Helper": "LoaderProcess",
    "Helpers": "LoaderPool",
    "Kept": "StorageDtypes",
    "Level": "MemoryTier",
    "Loads": "LoadQueue",
    "Meters": "RateLimiter",
    "Piece": "Chunk",
    "Probe": "AttentionProbe",
    "Proof": "ReferenceCheck",
    "Seen": "CallRecorder",
    "SlotBank": "AdapterSlots",
    "Tally": "TenantUsage",
    "Turns": "RotaryTable",
    "WholeLayers": "FusedDecoder",
    "front": "ServerState and its services",
    "give_up": "mark_for_deletion",
    "own_clock": "thread_clock",
    "own_time": "thread_clock",
}


def retired(identifier: str) -> str | None:
    """Give what this code says for an identifier that is retired or has a retired part; None for any other."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_")
    return NAMES.get(identifier) or next((WORDS[part] for part in parts if part in WORDS), None)


def _identifiers() -> Iterator[tuple[str, str]]:
    """Give every identifier of the sources with its place; comments and strings are none."""
    for path in files(*PACKAGES):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME:
                    yield f"{name_of(path)}:{token.start[0]}", token.string


def test_a_class_name_stands_for_one_thing() -> None:
    """No two public classes of the three packages share a name."""
    places = defaultdict(list)
    for path, node in nodes(ast.ClassDef, *PACKAGES):
        if not node.name.startswith("_"):
            places[node.name].append(f"{name_of(path)}:{node.lineno}")
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert len(places) > 100 and not twice, twice


def test_retired_words_stay_away() -> None:
    """No identifier of the sources is, or has as a part, a word that was given up for the field's own."""
    found = [f"{place} {name}: say {instead}" for place, name in _identifiers() if (instead := retired(name))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("identifier", ["hats_of", "HatLinear", "NUM_HATS", "Front", "set_worn"])
def test_a_retired_word_is_found(identifier: str) -> None:
    """A retired word is found at any place in an identifier, in any case."""
    assert retired(identifier) is not None


@pytest.mark.parametrize("identifier", ["that", "manyhats", "chat_template", "what", "banking77", "answer", "Shape"])
def test_other_words_are_free(identifier: str) -> None:
    """A word that merely contains a retired one is free."""
    assert retired(identifier) is None
