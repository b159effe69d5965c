"""End to end with every family: uploaded to a server over the real engine, shown, and answered as the formulas say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters_store.format.folder import CONFIG, WEIGHTS, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Patch
from server.engine.client import require_ready
from tests.kit import reference
from tests.kit.adapters import zip_folder
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.kit.like_peft import TOKENS, peft_logits
from tests.server.world import Site, error_of, serve_real, until

pytestmark = pytest.mark.anyio
NAMES = [*FAMILIES, *FAMILIES_OF_BIASED]
PROMPT = "Once upon a time there was a hat that many wore, each of them otherwise."  # more than two blocks
BODY = {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True}
NUM_RUNNING = 40  # all families at once


@dataclass
class Served:
    """A server with a task of each family, and what its answers must be."""

    site: Site
    folders: dict[str, Path]
    stock: Any

    def patch(self, task: str) -> Patch:
        """A task's artifact, compiled here."""
        return compile_patch(read_folder(self.folders[task]), require_ready(self.site.state.client).spec)

    def wanted(self, *adapters: tuple[str, float]) -> list[int]:
        """The greedy answer of the stock model with the patches' formulas."""
        prompt = self.site.state.tokenizer.encode(PROMPT)
        return reference.greedy(self.stock, [(self.patch(task), weight) for task, weight in adapters], prompt, 16)

    async def worn(self, *adapters: tuple[str, float]) -> dict[str, Any]:
        """The answer of several adapters composed."""
        listed = [{"task": task, "weight": weight} for task, weight in adapters]
        answer = await self.site.post("/generate", {**BODY, "adapters": listed})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
async def served(
    anyio_backend: str,
    biased_base: Path,
    artifact: Callable[[str, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Served]:
    """Every family's first artifact is uploaded as a zip, as the task of the family's name."""
    folders = {name: artifact(name, 0) for name in NAMES}
    stock = AutoModelForCausalLM.from_pretrained(biased_base).eval()
    async with serve_real(
        biased_base, tmp_path_factory.mktemp("served"), max_running=NUM_RUNNING, max_waiting=NUM_RUNNING
    ) as site:
        for name, folder in folders.items():
            uploaded = await site.upload(name, zip_folder(folder))
            assert uploaded.status_code == 201, uploaded.text
        yield Served(site, folders, stock)


def tokens(answer: dict[str, Any]) -> list[int]:
    """The token ids of an answer's one choice."""
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def num_virtual(folder: Path) -> int:
    """The number of virtual tokens of an artifact, by its config."""
    config = json.loads((folder / CONFIG).read_text())
    if config["peft_type"] == "CPT":
        return len(config["cpt_token_ids"])
    return int(config.get("num_virtual_tokens") or 0)


async def test_tasks_show_what_they_are(served: Served) -> None:
    """GET /tasks/{task} has the artifact's method, parameters and bytes, its bytes in a slot, its virtual tokens."""
    listed = (await served.site.http.get("/tasks")).json()["tasks"]
    versions = {task["task"]: task["versions"][0] for task in listed if task["task"] != "base"}
    assert set(versions) == set(NAMES)
    for name, folder in served.folders.items():
        shown = (await served.site.http.get(f"/tasks/{name}")).json()["versions"][0]
        assert shown.items() >= {key: versions[name][key] for key in ("digest", "method", "bytes")}.items()
        assert shown["method"] == json.loads((folder / CONFIG).read_text())["peft_type"].lower(), name
        assert shown["num_parameters"] == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values()), name
        assert shown["bytes"] == sum(path.stat().st_size for path in (folder / CONFIG, folder / WEIGHTS)), name
        assert shown["slot_bytes"] == 4 * served.patch(name).num_items, name
        assert shown["virtual_tokens"] == num_virtual(folder), name


async def test_alone_in_a_stream_and_all_at_once(served: Served) -> None:
    """Plain, streamed and among all others the tokens are those of the formulas; usage counts the virtual tokens."""
    site, names = served.site, ["base", *NAMES]
    wanted = {name: served.wanted((name, 1.0)) if name != "base" else served.wanted() for name in names}
    alone = {name: await site.ask(name, **BODY) for name in names}
    assert {name: tokens(answer) for name, answer in alone.items()} == wanted
    usage = {name: answer["usage"]["virtual_tokens"] for name, answer in alone.items()}
    assert usage == {"base": 0, **{name: num_virtual(folder) for name, folder in served.folders.items()}}
    assert all(answer["usage"]["prompt_tokens"] == len(PROMPT) for answer in alone.values())
    together = await asyncio.gather(*(site.ask(name, **BODY) for name in names))
    assert dict(zip(names, map(tokens, together), strict=True)) == wanted
    streams = await asyncio.gather(*(site.events(f"/generate?task={name}", **BODY) for name in names))
    assert [[token for event in events for token in event["token_ids"]] for events in streams] == [*wanted.values()]
    versions = [task["versions"][0] for task in (await site.http.get("/tasks")).json()["tasks"][1:]]
    assert {version["residency"] for version in versions} == {"slot"}
    await until(lambda: (site.state.client.stats.num_running, site.state.client.stats.num_pins) == (0, 0))


SCORED = list(range(5, 245, 4))  # a prompt of more than a block
SCORES = {"prompt_token_ids": SCORED, "max_tokens": 0, "prompt_logprobs": 2}


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    """The log-probabilities of a prompt's tokens, which begin behind the first."""
    first, *scores = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    return [score["logprob"] for score in scores]


async def test_prompts_are_scored_as_the_formulas_say(served: Served) -> None:
    """Alone and among all others a prompt has the same scores, which are those of the stock model with the formulas."""
    site, names = served.site, ["base", *NAMES]
    together = await asyncio.gather(*(site.ask(name, **SCORES) for name in names))
    for name, answer in zip(names, together, strict=True):
        adapters = [] if name == "base" else [(served.patch(name), 1.0)]
        wanted = reference.logits(served.stock, adapters, SCORED)[:-1].log_softmax(-1)
        chosen = wanted[range(len(SCORED) - 1), SCORED[1:]]
        assert logprobs_of(answer) == pytest.approx(chosen.tolist(), rel=2e-5, abs=1e-4), name
        tops = [[top["token_id"] for top in one["top"]] for one in answer["choices"][0]["prompt_logprobs"][1:]]
        assert tops == wanted.topk(2).indices.tolist(), name
        if name not in ("base", "lora", "ia3", "prefix-tuning", "prompt-tuning", "bottleneck-houlsby"):
            continue
        assert (await site.ask(name, **SCORES))["choices"] == answer["choices"], name
        generated = {"echo": True, "logprobs": 2, "max_tokens": 3, "seed": 1, "ignore_eos": True}
        told = await site.post("/v1/completions", {**generated, "model": name, "prompt": [SCORED, SCORED[:7]]})
        whole, short = (choice["logprobs"]["token_logprobs"] for choice in told.json()["choices"])
        assert whole[: len(SCORED)] == [None, *logprobs_of(answer)] and len(whole) == len(SCORED) + 3
        assert short[:7] == whole[:7]


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix-tuning", "prompt-tuning"])
async def test_prompts_are_scored_as_peft_does(served: Served, biased_base: Path, name: str) -> None:
    """The scores of a prompt are PEFT's to 1e-4."""
    wanted = peft_logits(biased_base, served.folders[name])[:-1].log_softmax(-1)
    answer = await served.site.ask(name, **{**SCORES, "prompt_token_ids": TOKENS})
    assert logprobs_of(answer) == pytest.approx(wanted[range(len(TOKENS) - 1), TOKENS[1:]].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["lora", "prompt-tuning", "prefix-tuning"])
async def test_continuations_are_scored_behind_their_prompt(served: Served, name: str) -> None:
    """Each continuation has the scores that its tokens have in the whole text, and the prompt is computed once."""
    site, continuations = served.site, [[at, 9, at, 7] for at in range(40, 48)]
    body = {"prompt_token_ids": SCORED, "continuations": continuations, "logprobs": True}
    answer = (await site.post(f"/score?task={name}", body)).json()
    asked = [{**SCORES, "prompt_token_ids": SCORED + continuation} for continuation in continuations]
    wholes = await asyncio.gather(*(site.ask(name, **body) for body in asked))
    for whole, score in zip(wholes, answer["scores"], strict=True):
        own = whole["choices"][0]["prompt_logprobs"][-4:]
        assert score == {
            "logprob": sum(one["logprob"] for one in own),
            "num_tokens": 4,
            "is_greedy": all(one["top"][0]["token_id"] == one["token_id"] for one in own),
            "token_logprobs": [one["logprob"] for one in own],
        }
    assert answer["usage"]["prompt_tokens"] == 8 * (len(SCORED) + 4)
    assert answer["usage"]["cached_tokens"] >= 7 * 32 and answer["usage"]["completion_tokens"] == 0
    greedy = reference.greedy(served.stock, [(served.patch(name), 1.0)], SCORED, 3)
    body = {"prompt_token_ids": SCORED, "continuations": [greedy, [*greedy[:2], (greedy[2] + 1) % 200]]}
    found = (await site.post(f"/score?task={name}", body)).json()
    assert [one["is_greedy"] for one in found["scores"]] == [True, False]


LABELS = ["hat", "ha", "brim"]


async def test_labels_are_as_probable_as_the_formulas_say(served: Served) -> None:
    """Among all others a label's probability is that of its tokens behind the prompt, as a share of all labels'."""
    site, names = served.site, ["base", *NAMES]
    form = {"type": "choice", "choices": LABELS}
    body = {"prompt_token_ids": SCORED, "response_format": form, "label_probs": True, "max_tokens": 4}
    together = list[dict[str, Any]]()
    for some in (names[at : at + 9] for at in range(0, len(names), 9)):  # each has a sequence a label
        together += await asyncio.gather(*(site.ask(name, **body) for name in some))
    for name, answer in zip(names, together, strict=True):
        adapters, logprobs = [] if name == "base" else [(served.patch(name), 1.0)], []
        for label in LABELS:
            tokens = site.state.tokenizer.encode(label)
            wanted = reference.logits(served.stock, adapters, [*SCORED, *tokens]).log_softmax(-1)
            logprobs.append(wanted[range(len(SCORED) - 1, len(SCORED) - 1 + len(tokens)), tokens].sum())
        probs = torch.stack(logprobs).softmax(-1).tolist()
        found = answer["choices"][0]["label_probs"]
        assert found == pytest.approx(dict(zip(LABELS, probs, strict=True)), rel=1e-3), name
        assert answer["choices"][0]["text"] in LABELS
        assert sum(found.values()) == pytest.approx(1.0)
    assert (await site.ask("lora", **body))["choices"] == together[names.index("lora")]["choices"]


MIXTURES: list[list[tuple[str, float]]] = [
    [("lora", 0.5), ("ia3", 0.5)],
    [("dora", 1.0), ("bottleneck-houlsby", 0.5), ("bitfit", -0.5)],
    [("selective-layer", 0.3), ("trainable-tokens", 1.0), ("vera", 0.7)],
    [("ln-tuning", 0.5), ("lokr", 0.0), ("bottleneck-parallel", 1.0), ("loha", 0.2)],
    [("lora-bias", 0.5), ("lora-saved", 0.25), ("adalora", 0.5)],
    [("cpt", 1.0), ("lora", 0.8)],
    [("bottleneck-pfeiffer", 1.0), ("prefix-tuning", 1.0), ("ia3", 0.5)],
    [("prompt-tuning", 1.0), ("p-tuning", 1.0)],
    [("p-tuning", 1.0), ("prompt-tuning", 1.0)],
    [("cartridge", 1.0), ("prefix-tuning", 1.0), ("multitask-prompt-tuning", 1.0)],
]


async def test_several_families_on_one_request(served: Served) -> None:
    """Hats of several families compose as the formulas do, with weights; prefixes stand in the order of the list."""
    wanted = [served.wanted(*adapters) for adapters in MIXTURES]
    together = await asyncio.gather(*(served.worn(*adapters) for adapters in MIXTURES))
    assert [tokens(answer) for answer in together] == wanted
    assert wanted[7] != wanted[8]
    for adapters, answer in zip(MIXTURES, together, strict=True):
        assert answer["usage"]["virtual_tokens"] == sum(num_virtual(served.folders[task]) for task, _ in adapters), (
            adapters
        )


async def test_what_does_not_compose(served: Served) -> None:
    """A prefix has no weight, given keys come before computed ones, a task comes once, and all must fit: refused."""
    refused: dict[str, list[dict[str, Any]]] = {
        "the task cpt puts 3 virtual tokens before the prompt, which cannot be weighed: "
        "give it the weight 1, not 0.5": [{"task": "lora"}, {"task": "cpt", "weight": 0.5}],
        "the task cartridge (cartridge) brings keys and values of the first positions: list it before the task cpt": [
            {"task": "cpt"},
            {"task": "cartridge"},
        ],
        "the task ia3 is listed twice: a request wears a task once": [{"task": "ia3"}, {"task": "ia3", "weight": 0.5}],
    }
    for sentence, adapters in refused.items():
        answer = await served.site.post("/generate", {**BODY, "adapters": adapters})
        error = error_of(answer)
        assert (answer.status_code, error["message"], error["param"]) == (422, sentence, "adapters")
    body = {"prompt": "a" * 500, "max_tokens": 98, "adapters": [{"task": "cpt"}]}
    answer = await served.site.post("/generate", body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")
    assert "its adapters put 3 virtual tokens before it" in error_of(answer)["message"]
    assert (await served.site.post("/generate", {**body, "max_tokens": 97})).status_code == 200


@pytest.mark.parametrize("family", NAMES)
async def test_uploaded_again_with_other_weights(
    family: str, served: Served, artifact: Callable[[str, int], Path]
) -> None:
    """The same name with other weights is the next version and answers anew; the first one answers as it did."""
    old, folder = tokens(await served.site.ask(family, **BODY)), artifact(family, 1)
    uploaded = await served.site.upload(family, zip_folder(folder))
    assert (uploaded.status_code, uploaded.json()["version"]) == (201, 2), uploaded.text
    patch = compile_patch(read_folder(folder), require_ready(served.site.state.client).spec)
    prompt = served.site.state.tokenizer.encode(PROMPT)
    new = reference.greedy(served.stock, [(patch, 1.0)], prompt, 16)
    assert tokens(await served.site.ask(family, **BODY)) == new != old
    assert tokens(await served.site.ask(family, version=1, **BODY)) == old
    assert (await served.site.http.delete(f"/tasks/{family}/versions/2")).status_code == 204
