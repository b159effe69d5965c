"""Train, push, generate: every method of `manyhats train`, over the real engine on a tiny random base."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters_store.format.folder import Artifact, read_folder
from adapters_store.format.manifest import Manifest, ParityCase
from adapters_store.methods import METHODS as SERVED
from tests.kit.adapters import zip_folder
from tests.kit.tiny import EOS
from tests.server.world import Site, error_of, serve_real
from tests.training.conftest import flags
from training.methods import METHODS
from training.push import Target, push_folder

pytestmark = pytest.mark.anyio
# Other options than the defaults, for a base of two layers, and how often a step is taken.
SMALL: dict[str, list[object]] = {
    "lora": ["--use-rslora", "--target-modules", "q_proj,down_proj", "--dropout", 0.1],
    "adalora": ["--init-r", 6, "--target-r", 2],
    "selective": ["--layers", "0", "--parameters", "mlp.down_proj,bias"],
    "cpt": ["--num-virtual-tokens", 60, "--epsilon", 20],
    "prefix_tuning": ["--num-virtual-tokens", 7],
    "trainable_tokens": ["--token-indices", "50-150,258"],
}
VARIANTS: dict[str, list[object]] = {  # names of tasks -> the flags of a method whose options change the format
    "houlsby": ["--method", "bottleneck", "--placement", "houlsby", "--scaling", "learned", "--ln-before"],
    "parallel": ["--method", "bottleneck", "--placement", "parallel", "--scaling", "channel", "--ln-after"],
    "lstm": ["--method", "p_tuning", "--encoder-reparameterization-type", "LSTM"],
    "projected": ["--method", "prefix_tuning", "--prefix-projection"],
    "ranks": ["--method", "multitask_prompt_tuning", "--num-ranks", 3],
}
TASKS = {**{name: ["--method", name, *SMALL.get(name, [])] for name in METHODS}, **VARIANTS}
UPLOADED = [task for task in TASKS if task != "full"]
STEPS = 12


@dataclass
class Trained:
    """A server with a task of each method, and the artifacts as the trainer wrote them."""

    site: Site
    folders: dict[str, Path]

    def artifact(self, task: str) -> Artifact:
        return read_folder(self.folders[task])

    def manifest(self, task: str) -> Manifest:
        manifest = self.artifact(task).manifest
        assert manifest is not None
        return manifest

    async def answers(self, task: str, cases: list[ParityCase]) -> list[dict[str, Any]]:
        """The server's greedy answers to the cases' prompts, all at once."""
        bodies = [
            {"prompt_token_ids": case.prompt_token_ids, "max_tokens": len(case.continuation), "logprobs": 5}
            for case in cases
        ]
        found = await asyncio.gather(*(self.site.ask(task, **body) for body in bodies))
        return [answer["choices"][0] for answer in found]


@pytest.fixture(scope="module")
async def trained(
    anyio_backend: str,
    biased_base: Path,
    data: Path,
    command: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Trained]:
    """Every method is trained for a few steps, and pushed as the task of its name."""
    folder = tmp_path_factory.mktemp("trained")
    for task, chosen in TASKS.items():
        result = command(*flags(biased_base, data, folder / task, "--steps", STEPS, "--lr", 0.03, *chosen))
        assert result.exit_code == 0, f"{task}: {result.output}"
    async with serve_real(biased_base, folder / "served") as site:
        for task in UPLOADED:
            target = Target(str(site.http.base_url), task)
            outcome = (await asyncio.to_thread(push_folder, target, folder / task)).sentence
            assert f"{task} has it as version 1, and serves version 1." in outcome
        yield Trained(site, {task: folder / task for task in TASKS})


def test_every_method_that_is_served_can_be_trained(trained: Trained) -> None:
    """Every method that the server takes has a trainer."""
    written = {trained.artifact(task).config["peft_type"] for task in UPLOADED}
    assert written == set(SERVED)


@pytest.mark.parametrize("task", UPLOADED)
async def test_the_server_answers_as_was_trained(task: str, trained: Trained) -> None:
    """The loss fell; the server's answers are the trainer's own, token for token, and other than the base's.

    The five best first tokens are the manifest's, and the differences of their logits within 1e-3.
    """
    manifest = trained.manifest(task)
    scores, cases = manifest.evaluation, manifest.parity
    assert scores["after"]["perplexity"] < 0.9 * scores["before"]["perplexity"]
    answers, plain = await trained.answers(task, cases), await trained.answers("base", cases)
    wanted = [_without_eos(case.continuation) for case in cases]
    assert [_without_eos(answer["token_ids"]) for answer in answers] == wanted
    assert [_without_eos(answer["token_ids"]) for answer in plain] != wanted
    for answer, case in zip(answers, cases, strict=True):
        top = answer["logprobs"][0]["top"]
        assert [token["token_id"] for token in top] == [token for token, _ in case.top[:5]]
        served = [token["logprob"] - top[0]["logprob"] for token in top]
        assert served == pytest.approx([logit - case.top[0][1] for _, logit in case.top[:5]], abs=1e-3)


def _without_eos(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token != EOS]


async def test_full_is_not_for_upload(trained: Trained) -> None:
    """Full fine-tuning is for comparison: it says so, and the server refuses it."""
    refused = await trained.site.upload("full", zip_folder(trained.folders["full"]))
    assert refused.status_code == 422 and "full" in error_of(refused)["message"]
