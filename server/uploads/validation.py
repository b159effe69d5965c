"""Proof at the door, the same at every door: what an adapter must pass before anything of it is kept.

First by its bytes: form, finiteness, method, base, shapes, size. Then in the engine, as a few rows of its ordinary
steps: eight prompts whose logits must be finite; where the artifact carries parity they are its trainer's own, and the
logits and the continuation must be those of the trainer.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.identity import stamp_of
from adapters_store.errors import ArtifactError, ArtifactTooLargeError, ParityError, ProbeError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.format.manifest import ParityCase
from adapters_store.methods.compile import Room, compile_patch
from adapters_store.methods.shared.unused_tensors import unused_tensors, with_grad_tracking
from adapters_store.primitives import Patch
from adapters_store.registry.registry import Facts
from server.core import AdapterRef, EngineFailure, Logprobs, Sampling
from server.engine.client import EngineUnavailable
from server.engine.messages import Ready, Submit
from server.errors import EngineFailedError, ProbeLateError, ServerError, UnavailableError
from server.state import ServerState
from server.uploads import parity

MIN_ROOM = 2  # positions that a prefix must leave: one for a prompt, one for an answer
NUM_PROBES = 8
PROBE_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)
MAX_AT_ONCE = 4  # probes in the engine's batch
MAX_PARITY_TOKENS = 1024  # a longer prompt would take the engine too long
NUM_TOP = 100  # of the engine's best tokens, to find the trainer's 20 among
PROBE_WITHIN_S = 30.0
CHECKS = 1  # grows with every check that is new or stricter: what is stored must pass it, too
NAMESPACE = "_probe"  # no tenant can be named so

Check = dict[str, Any]
ProbeAnswer = list[Logprobs]  # of a prompt, by the tokens after it


@dataclass(frozen=True)
class ValidatedArtifact:
    """An artifact that passed every check, each with its figure."""

    facts: Facts
    checks: list[Check]


async def validate(state: ServerState, folder: Path, limit_s: float | None = None) -> ValidatedArtifact:
    """Put a PEFT folder of the staging area to the proof. Raises `ArtifactError`, or `ServerError` where it cannot be.

    The probes have `limit_s` seconds, by default `PROBE_WITHIN_S`. What fails leaves nothing behind in the engine.
    """
    artifact, patch, checks = await asyncio.to_thread(check_folder, state.ready(), folder)
    digest = artifact.digest
    try:
        async with state.probing:
            with state.in_use.hold([digest]), _staged(state, digest, folder):
                checks = checks + await _probe(state, artifact, patch, limit_s)
    except BaseException:
        await state.mark_for_deletion([digest])
        raise
    finally:
        await state.delete_if_unreferenced([digest])
    facts = Facts(
        digest=digest,
        method=patch.method,
        num_parameters=patch.num_parameters,
        num_items=patch.num_items,
        num_matrix_items=patch.num_matrix_items,
        num_virtual=patch.num_virtual,
        num_bytes=artifact.num_bytes,
        prompt_format=artifact.manifest.prompt_format if artifact.manifest else None,
    )
    return ValidatedArtifact(facts, checks)


async def validate_stored(state: ServerState, digest: str) -> None:
    """Put what lies in the store to the same proof. Raises what `validate` raises, and what `Blobs.read` does."""
    artifact = await asyncio.to_thread(state.blobs.read, digest)
    _, patch, _ = await asyncio.to_thread(_check_artifact, state.ready(), artifact)
    async with state.probing:
        await _probe(state, artifact, patch)


def compute_validation_fingerprint(base: Path, precision: str, device: str) -> str:
    """What a proof holds for: this base as it lies there, how it is computed, and these checks."""
    said = [version("manyhats"), CHECKS, precision, device, stamp_of(base)]
    return hashlib.sha256(repr(said).encode()).hexdigest()


@contextmanager
def _staged(state: ServerState, digest: str, folder: Path) -> Iterator[None]:
    """While the block runs the engine reads the artifact from the staging area."""
    state.client.stage(digest, str(folder))
    try:
        yield
    finally:
        state.client.stage(digest, None)


def check_folder(ready: Ready, folder: Path) -> tuple[Artifact, Patch, list[Check]]:
    """What the bytes of a PEFT folder alone can tell. Raises `ArtifactError`."""
    return _check_artifact(ready, read_folder(folder))


def _check_artifact(ready: Ready, artifact: Artifact) -> tuple[Artifact, Patch, list[Check]]:
    traced = with_grad_tracking(artifact)
    with torch.enable_grad():
        patch = compile_patch(traced, ready.spec, Room(ready.max_adapter_bytes, ready.item_bytes, ready.largest_value))
    if unused := unused_tensors(traced, patch):
        raise ArtifactError(f"the tensor {unused[0]} would act nowhere in {ready.spec.name}", unused[0])
    _check_virtual(patch, ready)
    count, is_named = len(artifact.tensors), artifact.manifest is not None
    checks: dict[str, tuple[float | str, str]] = {
        "form": (count, f"{count} tensors, {artifact.num_bytes} bytes"),
        "finite": (patch.num_parameters, f"{patch.num_parameters} parameters"),
        "method": (patch.method, patch.method),
        "base": (
            ready.spec.identity[:12],
            f"identity {ready.spec.identity[:12]} matches" if is_named else "no manifest: shapes alone tell",
        ),
        "shapes": (len(patch.primitives), f"{len(patch.primitives)} primitives for {ready.spec.name}"),
        "applied": (count, _applied(traced, patch)),
    }
    return artifact, patch, [_check(name, figure, detail) for name, (figure, detail) in checks.items()]


def _applied(traced: Artifact, patch: Patch) -> str:
    """None is idle: those that left no trace are settled."""
    count, acting = len(traced.tensors), sum(tensor.requires_grad for tensor in traced.tensors.values())
    repeats = ", the others repeat the base or one another" if acting < count else ""
    return f"{acting} of {count} tensors act in {len(patch.primitives)} primitives{repeats}"


def _check(name: str, figure: float | str, detail: str, **more: Any) -> Check:
    return {"name": name, "ok": True, "figure": figure, "detail": detail, **more}


def _check_virtual(patch: Patch, ready: Ready) -> None:
    """Refuse what leaves no room for a request. Raises `ArtifactTooLargeError`."""
    if patch.num_virtual + MIN_ROOM > ready.max_sequence_tokens:
        raise ArtifactTooLargeError(
            f"the adapter has {patch.num_virtual} virtual tokens, which leave no room for a prompt and an answer in "
            f"this server's {ready.max_sequence_tokens} tokens a sequence"
        )


async def _probe(state: ServerState, artifact: Artifact, patch: Patch, limit_s: float | None = None) -> list[Check]:
    """Let the engine wear an artifact, staged or stored. Raises `ProbeError`, `ParityError`, or `ServerError`."""
    ready, adapter = state.ready(), AdapterRef(artifact.digest, 1.0, patch.num_virtual)
    cases = parity_cases(artifact, ready, patch.num_virtual)
    prompts = [*cases, *plain_cases(ready, patch.num_virtual)][:NUM_PROBES]
    limit_s = PROBE_WITHIN_S if limit_s is None else limit_s
    deadline = time.monotonic() + limit_s
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + limit_s):
            answers = await _ask_all(state, adapter, prompts, deadline)
    except TimeoutError:
        raise _late(limit_s) from None
    except EngineUnavailable as error:
        raise UnavailableError(str(error), retry_after=2) from None
    lengths = sorted(len(case.prompt_token_ids) for case in prompts)
    detail = f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens: all logits are finite"
    return [_check("probe", len(prompts), detail), *compare(cases, answers, ready, artifact)]


def parity_cases(artifact: Artifact, ready: Ready, num_virtual: int) -> list[ParityCase]:
    """The first of an artifact's parity that this server has room for. Raises `ArtifactError` for a foreign token."""
    carried = artifact.manifest.parity if artifact.manifest else []
    tokens = (t for case in carried for t in (*case.prompt_token_ids, *case.continuation, *(t for t, _ in case.top)))
    if (largest := max(tokens, default=0)) >= ready.spec.vocab_size:
        raise ArtifactError(f"the parity names the token {largest}; {ready.spec.name} has {ready.spec.vocab_size}")
    room = min(ready.max_sequence_tokens - num_virtual, MAX_PARITY_TOKENS)
    return [case for case in carried if len(case.prompt_token_ids) + max(1, len(case.continuation)) <= room][
        :NUM_PROBES
    ]


def plain_cases(ready: Ready, num_virtual: int) -> list[ParityCase]:
    """Prompts from all over the vocabulary, of mixed length, that nobody has an answer to."""
    room, vocab = ready.max_sequence_tokens - num_virtual, ready.spec.vocab_size
    prompts = [[(7919 * number + 104729 * at) % vocab for at in range(n)] for number, n in enumerate(PROBE_LENGTHS, 1)]
    prompts = [prompt[: max(1, room - 2)] for prompt in prompts]
    return [ParityCase(prompt, [], [0] * min(2, room - len(prompt))) for prompt in prompts]


async def _ask_all(
    state: ServerState, adapter: AdapterRef, cases: Sequence[ParityCase], deadline: float
) -> list[ProbeAnswer]:
    """In a namespace of its own: nothing that was computed before is taken for what is to be proved."""
    namespace = f"{NAMESPACE} {uuid.uuid4().hex}"
    submits = [_submit(state.ready(), namespace, adapter, case, deadline) for case in cases]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_ask(state, submit)) for submit in submits]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _submit(ready: Ready, namespace: str, adapter: AdapterRef, case: ParityCase, deadline: float) -> Submit:
    sampling = Sampling(
        max_tokens=max(1, len(case.continuation)),
        logprobs=min(NUM_TOP, ready.spec.vocab_size),
        forced=tuple(case.continuation),
        ignore_eos=True,
    )
    return Submit(
        uuid.uuid4().hex,
        namespace,
        case.prompt_token_ids,
        sampling,
        deadline,
        time.monotonic(),
        (adapter,),
        max_running=MAX_AT_ONCE,
        is_probe=True,
    )


async def _ask(state: ServerState, submit: Submit) -> ProbeAnswer:
    found: ProbeAnswer = []
    async with aclosing(state.client.generate(submit)) as outputs:
        async for output in outputs:
            if output.failure is not None:
                raise _failure(output.failure)
            found += output.logprobs
    return found


def _failure(failure: EngineFailure) -> Exception:
    """Map the engine's failure to an upload's error; `TimeoutError` if the probe's time was over."""
    match failure.code:
        case "nonfinite_logits":
            return ProbeError(f"probe: {failure.message}")
        case "adapter_too_large":
            return ArtifactTooLargeError(failure.message)
        case "deadline_exceeded":
            return TimeoutError()
        case _:
            return EngineFailedError(failure)


def _late(limit_s: float) -> ServerError:
    message = f"the adapter could not be probed within {limit_s:g} s, for the engine is busy; nothing was stored"
    return ProbeLateError(message, retry_after=5)


def compare(cases: list[ParityCase], answers: list[ProbeAnswer], ready: Ready, artifact: Artifact) -> list[Check]:
    """The engine's answers beside the trainer's. Raises `ParityError`."""
    if not cases:
        return []
    carried, allowed = (
        artifact.manifest.parity if artifact.manifest else [],
        parity.tolerance(ready.precision, artifact),
    )
    error = max(parity.error(case, detail[0]) for case, detail in zip(cases, answers, strict=False))
    margin = max(parity.margin(detail) for detail in answers[: len(cases)])
    num_tokens = sum(len(case.continuation) for case in cases)
    detail = (
        f"{len(cases)} of {len(carried)} prompts: logits within {error:.4g} of the trainer's, its {num_tokens} tokens "
        f"within {margin:.4g} of the best; {allowed:g} is allowed at {ready.precision}"
    )
    if not max(error, margin) <= allowed:
        raise ParityError(f"parity: {detail}: the adapter answers here as it did not where it was trained")
    return [_check("parity", round(max(error, margin), 6), detail, limit=allowed)]
