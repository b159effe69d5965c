"""An `EngineClient` without an engine: deterministic answers at once, with no process and no torch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from adapters_store.base.spec import BaseSpec, ItemBytes, LinearSite
from server.core import AdapterRef, EngineFailure, Logprobs, Timing
from server.engine.client import EngineUnavailable
from server.engine.messages import Output, Ready, Stats, Submit


def fake_ready(**fields: Any) -> Ready:
    """Make the `Ready` of a tiny base; `fields` override its fields and those of its spec."""
    linears = {"model.layers.0.self_attn.q_proj": LinearSite(32, 32)}
    spec_fields = {name: fields.pop(name) for name in BaseSpec.__dataclass_fields__ if name in fields}
    defaults: dict[str, Any] = {
        "spec": replace(BaseSpec("fake", "0" * 64, "FakeForCausalLM", 512, 32, 2, 512, linears), **spec_fields),
        "eos_token_ids": [0],
        "max_sequence_tokens": 512,
        "max_adapter_bytes": 2**20,
        "item_bytes": ItemBytes(),
        "precision": "fp32",
        "load_seconds": 0.0,
    }
    return Ready(**defaults | fields)


def shift_of(adapters: tuple[AdapterRef, ...]) -> int:
    """Return by how much adapters shift every token of the echo: 0 for the base, 1 or more for any adapters."""
    if not adapters:
        return 0
    names = ",".join(f"{adapter.digest}*{adapter.weight!r}" for adapter in adapters)
    return 1 + hashlib.sha256(names.encode()).digest()[0]


class FakeEngineClient:
    """Echoes the prompt's tokens, each shifted by `shift_of(adapters)` within the vocabulary, then ends ("stop").

    With `ignore_eos` the echo starts over until `max_tokens`. `answer` replaces the echo: it returns the tokens (at
    least one) for a request. `delay_s` seconds pass before each token. `failure`, if set, ends every request instead of
    its first token. Calls are recorded in `submitted`, `aborted`, `discarded`, `staged`, `resident` and `renewed`.
    Probes of uploads are recorded in `probed`; they get their forced tokens at once, or `probe_failure` if it is set,
    or never end if `are_probes_stuck`.
    """

    def __init__(
        self,
        ready: Ready | None = None,
        *,
        answer: Callable[[Submit], list[int]] | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.ready: Ready | None = None
        self.last_error: str | None = None
        self.retry_after_s = 2
        self.stats = Stats()
        self.delay_s = delay_s
        self.failure: EngineFailure | None = None
        self.probe_failure: EngineFailure | None = None
        self.are_probes_stuck = False
        self.probed: list[Submit] = []
        self.staged: dict[str, str] = {}
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.discarded: list[str] = []
        self.resident: list[str] = []
        self.renewed: list[str] = []
        self.states: dict[str, str] = {}
        self._description = ready or fake_ready()
        self._answer = answer or self._echo
        self._died = asyncio.Event()

    async def start(self) -> Ready:
        """Become ready at once."""
        self.revive()
        return self._description

    async def close(self) -> None:
        """Become unready; running requests end as if the engine had died."""
        self.die()

    def die(self) -> None:
        """Act as if the engine had died: every running request fails, and none can start."""
        self.ready = None
        self._died.set()

    def revive(self) -> None:
        """Act as a restarted engine: ready, with no requests."""
        self.ready = self._description
        self._died = asyncio.Event()

    async def generate(self, submit: Submit) -> AsyncGenerator[Output]:
        """Yield one output a token; closing the iterator early is recorded in `aborted`."""
        if self.ready is None:
            raise EngineUnavailable(self.last_error or "the engine is not ready")
        if submit.is_probe:
            async for output in self._probe(submit):
                yield output
            return
        self.submitted.append(submit)
        self.states |= {adapter.digest: "slot" for adapter in submit.adapters}
        self.stats.num_running += 1
        is_over = False
        try:
            for output in self._outputs(submit):
                output = await self._unless_dead(output, self.delay_s)
                is_over = output.finish_reason is not None or output.failure is not None
                yield output
                if is_over:
                    return
        finally:
            self.stats.num_running -= 1
            if not is_over:
                self.aborted.append(submit.sequence_id)

    def discard(self, digest: str) -> None:
        """Record the digest in `discarded`."""
        self.discarded.append(digest)
        self.states.pop(digest, None)

    def stage(self, digest: str, folder: str | None) -> None:
        """Record the folder in `staged`, or remove it if it is None."""
        self.staged.pop(digest, None)
        if folder is not None:
            self.staged[digest] = folder

    async def _probe(self, submit: Submit) -> AsyncIterator[Output]:
        self.probed.append(submit)
        if self.are_probes_stuck:
            try:
                await self._died.wait()
            except asyncio.CancelledError:
                self.aborted.append(submit.sequence_id)
                raise
        for output in self._outputs(submit):
            yield await self._unless_dead(output, 0.0)

    def keep_resident(self, digests: list[str]) -> None:
        """Record the digests in `resident`."""
        self.resident = digests

    def renew(self, digest: str) -> None:
        """Record the digest in `renewed`."""
        self.renewed.append(digest)

    async def residency(self) -> dict[str, str]:
        """Return `states`: every digest that a request used is in a slot; a test may add others."""
        return dict(self.states)

    async def _unless_dead(self, output: Output, delay_s: float) -> Output:
        died = self._died
        if delay_s:
            try:
                async with asyncio.timeout(delay_s):
                    await died.wait()
            except TimeoutError:
                return output
        else:
            await asyncio.sleep(0)
        if died.is_set():
            failure = EngineFailure("engine_restarting", "the engine died while it ran this request; send it again")
            return Output(output.sequence_id, failure=failure)
        return output

    def _outputs(self, submit: Submit) -> list[Output]:
        failure = self.probe_failure if submit.is_probe else self.failure
        if failure is not None:
            return [Output(submit.sequence_id, failure=failure)]
        answer = list(submit.sampling.forced) or (self._echo if submit.is_probe else self._answer)(submit)
        tokens, reason = answer[: submit.sampling.max_tokens], "length"
        is_end, eos = submit.sampling.is_end, self._description.eos_token_ids
        if ends := [at for at, token in enumerate(tokens) if is_end(token, eos)]:
            tokens, reason = tokens[: ends[0] + 1], "stop"
        outputs = [self._output(submit, token) for token in tokens] or [Output(submit.sequence_id)]
        outputs[0].scores = self._scores(submit)
        outputs[0].timing = Timing(queued_ms=1.0, load_ms=0.0, ttft_ms=2.0)
        outputs[-1].finish_reason = reason
        return outputs

    def _output(self, submit: Submit, token: int) -> Output:
        num_top = submit.sampling.logprobs
        return Output(submit.sequence_id, [token], [] if num_top is None else [self._logprobs(token, num_top)])

    def _scores(self, submit: Submit) -> list[Logprobs]:
        """Score the prompt's tokens as a token of the answer is."""
        num_top = submit.sampling.prompt_logprobs
        tokens = [] if num_top is None else submit.prompt[submit.sampling.scored_from :]
        return [self._logprobs(token, num_top or 0) for token in tokens]

    def _logprobs(self, token: int, num_top: int) -> Logprobs:
        top = [((token + at) % self._description.spec.vocab_size, -0.25 * (at + 1)) for at in range(num_top)]
        return Logprobs(-0.25, top, is_greedy=True)

    def _echo(self, submit: Submit) -> list[int]:
        shift, vocab = shift_of(submit.adapters), self._description.spec.vocab_size
        echo = [(token + shift) % vocab for token in submit.prompt]
        if submit.sampling.ignore_eos:
            times = -(-submit.sampling.max_tokens // len(echo))
            return echo * times
        eos = self._description.eos_token_ids
        return [token for token in echo if token not in eos] + eos[:1]
