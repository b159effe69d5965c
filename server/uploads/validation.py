"""Validate an artifact before anything of it is kept: the same checks for uploads, imports and stored artifacts.

First by its bytes: form, finiteness, method, base, shapes, size. Then in the engine, as a few rows of its ordinary
steps: eight prompts whose logits must be finite. If the artifact carries parity cases, these are its trainer's prompts,
and the logits and the continuation must be the trainer's.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.identity import stamp_of
from adapters_store.errors import ArtifactError, ArtifactTooLargeError, ParityError, ProbeError, WrongBaseError
from adapters_store.format.folder import MANIFEST, Artifact, read_folder
from adapters_store.format.manifest import ParityCase
from adapters_store.methods.compile import Room, compile_patch
from adapters_store.methods.shared.idle import idle_primitives
from adapters_store.methods.shared.unused_tensors import unused_tensors, with_grad_tracking
from adapters_store.primitives import Patch
from adapters_store.registry.registry import Facts
from adapters_store.storage.directory import limit_s as limit_of
from server.core import AdapterRef, EngineFailure, Logprobs, Sampling
from server.engine.client import EngineClient, EngineUnavailable, require_ready
from server.engine.grammar import grammar_of, of_task
from server.engine.messages import Ready, Submit
from server.errors import EngineFailedError, ProbeLateError, UnavailableError, UnsupportedSchemaError
from server.stores import Stores
from server.tenant_work import TenantWork
from server.together import together
from server.uploads import parity
from server.uploads.retention import ArtifactRetention

MIN_ROOM = 2  # positions that a prefix must leave: one for a prompt, one for an answer
NUM_PROBES = 8
PROBE_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)
MAX_KEYS_CHARS = 500  # of a check's detail
MAX_AT_ONCE = 4  # probes in the engine's batch
MAX_PARITY_TOKENS = 1024  # a longer prompt would take the engine too long
NUM_TOP = 100  # of the engine's best tokens, to find the trainer's 20 among
PROBE_WITHIN_S = 30.0
PACE_WEIGHT = 0.3  # of the newest probe
CHECKS = 4  # grows with every check that is new or stricter: stored artifacts must pass it, too
NAMESPACE = "_probe"  # no tenant can be named so

Check = dict[str, Any]
ProbeAnswer = list[Logprobs]  # of a prompt, by the tokens after it


@dataclass(frozen=True)
class ValidatedArtifact:
    """An artifact that passed every check, each with its figure."""

    facts: Facts
    checks: list[Check]


class Validator:
    """Validates artifacts by their bytes and in the engine, one at a time."""

    def __init__(
        self, client: EngineClient, stores: Stores, retention: ArtifactRetention, tenant_work: TenantWork
    ) -> None:
        self._client, self._stores, self._retention = client, stores, retention
        self._tenant_work = tenant_work
        self._pace_s = 1.0  # of a probe
        self._probing = asyncio.Lock()  # one artifact at a time is probed

    async def validate(self, folder: Path, limit_s: float | None = None) -> ValidatedArtifact:
        """Validate a PEFT folder of the staging area; one that fails leaves nothing behind in the engine.

        The probes have `limit_s` seconds, by default `PROBE_WITHIN_S`. Raises `ArtifactError` if it fails, or
        `ServerError` if the engine cannot tell.
        """
        artifact, patch, checks = await self._tenant_work.run(check_folder, require_ready(self._client), folder)
        digest = artifact.digest
        try:
            async with self._probing:
                with self._retention.hold([digest]), self._staged(digest, folder):
                    checks = checks + await self._probe(artifact, patch, limit_s)
        except BaseException:
            await self._retention.mark_for_deletion([digest])
            raise
        finally:
            await self._retention.delete_if_unreferenced([digest])
        return ValidatedArtifact(_facts(artifact, patch), checks)

    def retry_after_s(self, num_before: int = 1) -> int:
        """Estimate the seconds until so many probes have ended, by what the last ones took."""
        return max(1, math.ceil(num_before * self._pace_s))

    async def validate_stored(self, digest: str) -> None:
        """Validate an artifact of the store. Raises the errors of `validate`, and those of `Blobs.read`."""
        ready, read = require_ready(self._client), partial(self._stores.blobs.read, digest)
        artifact = await self._stores.storage.call_within(limit_of(ready.max_adapter_bytes), read)
        _, patch, _ = await self._tenant_work.run(_check_artifact, ready, artifact)
        async with self._probing:
            await self._probe(artifact, patch)

    @contextmanager
    def _staged(self, digest: str, folder: Path) -> Iterator[None]:
        """Let the engine read the artifact from the staging area while the block runs."""
        self._client.stage(digest, str(folder))
        try:
            yield
        finally:
            self._client.stage(digest, None)

    async def _probe(self, artifact: Artifact, patch: Patch, limit_s: float | None = None) -> list[Check]:
        """Run prompts with an artifact, staged or stored. Raises `ProbeError`, `ParityError`, or `ServerError`."""
        ready, adapter = require_ready(self._client), AdapterRef(artifact.digest, 1.0, patch.num_virtual)
        cases = parity_cases(artifact, ready, patch.num_virtual)
        prompts = [*cases, *plain_cases(ready, patch.num_virtual)][:NUM_PROBES]
        limit_s = PROBE_WITHIN_S if limit_s is None else limit_s
        began = time.monotonic()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + limit_s):
                answers = await self._ask_all(adapter, prompts, began + limit_s)
            self._pace_s += PACE_WEIGHT * (time.monotonic() - began - self._pace_s)
        except TimeoutError:
            self._pace_s = max(self._pace_s, limit_s)
            message = (
                f"the adapter could not be probed within {limit_s:g} s, for the engine is busy; nothing was stored"
            )
            raise ProbeLateError(message, retry_after=self.retry_after_s()) from None
        except EngineUnavailable as error:
            raise UnavailableError(str(error), retry_after=self._client.retry_after_s) from None
        lengths = sorted(len(case.prompt_token_ids) for case in prompts)
        detail = f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens: all logits are finite"
        return [check("probe", len(prompts), detail), *compare(cases, answers, ready, artifact)]

    async def _ask_all(self, adapter: AdapterRef, cases: Sequence[ParityCase], deadline: float) -> list[ProbeAnswer]:
        """Answers in order. In a namespace of its own: no cached KV of before stands in for what is validated."""
        namespace = f"{NAMESPACE} {uuid.uuid4().hex}"
        submits = [_probe_of(require_ready(self._client), namespace, adapter, case, deadline) for case in cases]
        answers: list[ProbeAnswer] = await together(*(self._ask(submit) for submit in submits))
        return answers

    async def _ask(self, submit: Submit) -> ProbeAnswer:
        answer: ProbeAnswer = []
        async with aclosing(self._client.generate(submit)) as outputs:
            async for output in outputs:
                if output.failure is not None:
                    raise _failure(output.failure)
                answer += output.logprobs
        return answer


def _facts(artifact: Artifact, patch: Patch) -> Facts:
    return Facts(
        digest=artifact.digest,
        method=patch.method,
        num_parameters=patch.num_parameters,
        num_items=patch.num_items,
        num_matrix_items=patch.num_matrix_items,
        num_virtual=patch.num_virtual,
        num_bytes=artifact.num_bytes,
        prompt_format=artifact.manifest.prompt_format if artifact.manifest else None,
        ends=_ends(artifact),
        generation=artifact.manifest.generation if artifact.manifest else None,
        form=artifact.manifest.form if artifact.manifest else None,
        tools=artifact.manifest.tools if artifact.manifest else None,
        reasoning=artifact.manifest.reasoning if artifact.manifest else None,
    )


def compute_validation_fingerprint(base: Path, precision: str, device: str, rotary: str = "") -> str:
    """Hash of all that a validation holds for: the base's files, precision, device, and the version of these checks.

    `rotary` names the factors that the longest sequence chose (see `rotary_choice`).
    """
    said = [version("manyhats"), CHECKS, precision, device, rotary, stamp_of(base)]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def check_folder(ready: Ready, folder: Path) -> tuple[Artifact, Patch, list[Check]]:
    """Check a PEFT folder by its bytes alone. Returns it read and compiled, with the checks; raises `ArtifactError`."""
    return _check_artifact(ready, read_folder(folder))


def _check_artifact(ready: Ready, artifact: Artifact) -> tuple[Artifact, Patch, list[Check]]:
    traced = with_grad_tracking(artifact)
    with torch.enable_grad():
        patch = compile_patch(traced, ready.spec, Room(ready.max_adapter_bytes, ready.item_bytes, ready.largest_value))
    if unused := unused_tensors(traced, patch):
        raise ArtifactError(f"the tensor {unused[0]} would act nowhere in {ready.spec.name}", unused[0])
    _check_virtual(patch, ready)
    _check_ends(artifact, ready)
    _check_form(artifact, ready)
    _check_rotary(artifact, ready)
    idle = _idle_sites(artifact, patch, ready)
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
        "ends": (len(_ends(artifact)), _told_ends(artifact)),
        "applied": (count, _applied(traced, patch, idle)),
    }
    if keys := sorted(traced.idle_keys):
        checks["config"] = (len(keys), f"keys that are not known and not used: {', '.join(keys)[:MAX_KEYS_CHARS]}")
    return artifact, patch, [check(name, figure, detail) for name, (figure, detail) in checks.items()]


def _idle_sites(artifact: Artifact, patch: Patch, ready: Ready) -> list[str]:
    """Return the sites of primitives that change nothing. Raises `ArtifactError` if none changes anything."""
    is_halved = ready.largest_value <= torch.finfo(torch.float16).max
    item_dtype = torch.float16 if is_halved else torch.float32
    file_dtype = max((tensor.dtype for tensor in artifact.tensors.values()), key=lambda kind: torch.finfo(kind).eps)
    idle = [primitive.site for primitive in idle_primitives(patch, item_dtype, file_dtype)]
    if idle and len(idle) == len(patch.primitives):
        raise ArtifactError(
            f"the adapter changes nothing: at {idle[0]} and all its other sites it leaves every input as it is, as an "
            "adapter does before it is trained",
            idle[0],
        )
    return idle


def _applied(traced: Artifact, patch: Patch, idle: list[str]) -> str:
    """Say how many tensors act; one without a gradient was found to repeat the base or another tensor."""
    count, acting = len(traced.tensors), sum(tensor.requires_grad for tensor in traced.tensors.values())
    repeats = ", the others repeat the base or one another" if acting < count else ""
    told = f"; {len(idle)} of the primitives change nothing, the first at {idle[0]}" if idle else ""
    return f"{acting} of {count} tensors act in {len(patch.primitives)} primitives{repeats}{told}"


def check(name: str, figure: float | str, detail: str, **more: Any) -> Check:
    """Write a check that was passed as the answer to an upload shows it."""
    return {"name": name, "ok": True, "figure": figure, "detail": detail, **more}


def _check_rotary(artifact: Artifact, ready: Ready) -> None:
    """Raise `WrongBaseError` if the trainer's base had other rotary factors than those that are served."""
    theirs = "" if artifact.manifest is None else artifact.manifest.rotary
    ours = "" if ready.forward is None else ready.forward.rotary
    if theirs and ours and theirs != ours:
        raise WrongBaseError(
            f"the adapter was trained with the base's rotary factors {theirs}, and this server has {ours}: choose the "
            "same by --max-sequence-tokens (and --kv-cache-bytes) here, or by --max-length of the training",
            "rotary",
        )


def _check_virtual(patch: Patch, ready: Ready) -> None:
    """Raise `ArtifactTooLargeError` if the virtual tokens leave no room for a request."""
    if patch.num_virtual + MIN_ROOM > ready.max_sequence_tokens:
        raise ArtifactTooLargeError(
            f"the adapter has {patch.num_virtual} virtual tokens, which leave no room for a prompt and an answer in "
            f"this server's {ready.max_sequence_tokens} tokens a sequence"
        )


def _ends(artifact: Artifact) -> tuple[int, ...]:
    return tuple(artifact.manifest.ends) if artifact.manifest else ()


def _check_ends(artifact: Artifact, ready: Ready) -> None:
    """Raise `ArtifactError` for an end token that no answer can have: a request would run to its `max_tokens`."""
    generation = artifact.manifest.generation if artifact.manifest else None
    stops = (generation.stop_token_ids if generation else None) or ()
    if (largest := max((*_ends(artifact), *stops), default=0)) >= ready.spec.vocab_size:
        raise ArtifactError(
            f"ends names the token {largest}, which {ready.spec.name} with {ready.spec.vocab_size} tokens never "
            "writes: its answers would not end",
            "ends",
        )


def _check_form(artifact: Artifact, ready: Ready) -> None:
    """Raise `ArtifactError` for a form of answers that this server cannot hold them to."""
    manifest = artifact.manifest
    if manifest is None or manifest.form is None:
        return
    if not ready.has_forms:
        raise ArtifactError(f"the manifest has a form, and the tokenizer of {ready.spec.name} serves none", "form")
    lead = manifest.prompt_format.lead if manifest.prompt_format else ""
    try:
        grammar_of(of_task(manifest.form), lead)
    except UnsupportedSchemaError as error:
        raise ArtifactError(f"{MANIFEST}: {error}", error.param or "form") from None


def _told_ends(artifact: Artifact) -> str:
    ends = ", ".join(map(str, _ends(artifact)))
    return (
        f"an answer ends at {ends} and at the base's ends" if ends else "none of its own: an answer ends as the base's"
    )


def parity_cases(artifact: Artifact, ready: Ready, num_virtual: int) -> list[ParityCase]:
    """The first parity cases that this server has room for. Raises `ArtifactError` for a token that the base lacks."""
    carried = artifact.manifest.parity if artifact.manifest else []
    tokens = (t for case in carried for t in (*case.prompt_token_ids, *case.continuation, *(t for t, _ in case.top)))
    if (largest := max(tokens, default=0)) >= ready.spec.vocab_size:
        raise ArtifactError(f"the parity names the token {largest}; {ready.spec.name} has {ready.spec.vocab_size}")
    room = min(ready.max_sequence_tokens - num_virtual, MAX_PARITY_TOKENS)
    return [case for case in carried if len(case.prompt_token_ids) + max(1, len(case.continuation)) <= room][
        :NUM_PROBES
    ]


def plain_cases(ready: Ready, num_virtual: int) -> list[ParityCase]:
    """Prompts from all over the vocabulary, of mixed length, without a trainer's answer."""
    room, vocab = ready.max_sequence_tokens - num_virtual, ready.spec.vocab_size
    prompts = [[(7919 * number + 104729 * at) % vocab for at in range(n)] for number, n in enumerate(PROBE_LENGTHS, 1)]
    prompts = [prompt[: max(1, room - 2)] for prompt in prompts]
    return [ParityCase(prompt, [], [0] * min(2, room - len(prompt))) for prompt in prompts]


def _probe_of(ready: Ready, namespace: str, adapter: AdapterRef, case: ParityCase, deadline: float) -> Submit:
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


def _failure(failure: EngineFailure) -> Exception:
    """Map an engine's failure to an upload's error; `TimeoutError` if the probe's time was over."""
    match failure.code:
        case "nonfinite_logits":
            return ProbeError(f"probe: {failure.message}")
        case "adapter_too_large":
            return ArtifactTooLargeError(failure.message)
        case "deadline_exceeded":
            return TimeoutError()
        case _:
            return EngineFailedError(failure)


def compare(cases: list[ParityCase], answers: list[ProbeAnswer], ready: Ready, artifact: Artifact) -> list[Check]:
    """Compare the engine's answers with the trainer's. Raises `ParityError` if they differ by more than is allowed."""
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
    return [check("parity", round(max(error, margin), 6), detail, limit=allowed)]
