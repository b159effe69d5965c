"""Words that the API, the engine and the model share: sampling, rows of a step, results. No torch here."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, Protocol

import msgspec


class FormSpec(msgspec.Struct, frozen=True):
    """A form that a request names: a JSON schema, a regular expression, texts to choose from, a grammar, or parts.

    `field` is the path of the field that names it, for errors.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "parts"]
    value: Any
    field: str


class FreeForm(msgspec.Struct, frozen=True):
    """A request's word for free text, against the form that its adapters carry."""


AskedForm = FormSpec | FreeForm


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of one sequence; `seed` is always set, by the API if the user gave none.

    `forced` tokens are taken as the answer, whatever the logits say, and only scored. The answer ends at a token of
    `stop_token_ids`, as at the base's own end tokens, which alone `ignore_eos` passes over. With `prompt_logprobs` the
    prompt's tokens from index `scored_from` on are scored, each with so many alternatives; then `max_tokens` may be 0.
    The first token has no score: nothing predicts it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    forced: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    scored_from: int = 1

    def is_end(self, token: int, eos_token_ids: Container[int]) -> bool:
        """Whether a token ends the answer; `eos_token_ids` are the base's own."""
        return token in self.stop_token_ids or (token in eos_token_ids and not self.ignore_eos)


class ScoredTokens(msgspec.Struct, frozen=True):
    """Tokens of a prompt that a row scores: those that follow its positions `start ..`, with `num_top` alternatives."""

    start: int
    tokens: list[int]
    num_top: int = 0


class Row(msgspec.Struct):
    """A sequence's share of a step: `tokens` at positions `start ..`, whose KV lies in `blocks`.

    The first `num_virtual` positions of the sequence are virtual: their tokens are -1, -2, …, they stand for
    its adapters' prefixes, and they are not in `history`.
    `adapters` lists (slot, weight): none is the base, several compose. `sampling` is None if no token is wanted
    (a prompt's chunk that is not its last, or a prompt that is only scored). `targets` are the prompt's tokens that it
    scores. `history` is every token of the sequence so far, of which the first `num_prompt` are the prompt; it ends
    with `tokens`. `mask` has a bit for each token that may be sampled, from the lowest up; None is all of them.
    """

    tokens: list[int]
    start: int
    blocks: list[int]
    adapters: tuple[tuple[int, float], ...] = ()
    sampling: Sampling | None = None
    history: list[int] = []
    num_prompt: int = 0
    num_virtual: int = 0
    targets: ScoredTokens | None = None
    mask: bytes | None = None

    @property
    def num_logits(self) -> int:
        """The number of its positions whose logits are wanted: those of its targets, then the one that is sampled."""
        return (0 if self.targets is None else len(self.targets.tokens)) + (self.sampling is not None)


class Logprobs(msgspec.Struct):
    """The chosen token's log-probability and the `top` alternatives (token, log-probability), best first.

    They are those of the model's own distribution, before temperature and penalties; `is_greedy` tells whether the
    chosen token is its best one.
    """

    chosen: float
    top: list[tuple[int, float]] = []
    is_greedy: bool = False


class Sampled(msgspec.Struct):
    """The result of a row: a token, or `error` (for example non-finite logits), which ends that sequence alone.

    `token` is -1 if none was wanted; `scores` are of the row's targets. `is_internal` tells an error that the row's own
    values do not explain.
    """

    token: int = -1
    logprobs: Logprobs | None = None
    scores: list[Logprobs] = []
    error: str | None = None
    is_internal: bool = False


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The base that the model loads, how it computes it, and the size of its KV cache.

    `folder` holds the converted base, `name` is what requests call it. `precision` is auto, fp32, bf16, fp16 or int8;
    `device` is cpu or cuda[:N]. `block_size` is tokens a KV block. `max_sequence_tokens` bounds prompt and answer
    together; None leaves the bound to the base's positions and the KV cache.
    """

    folder: str
    name: str
    precision: str = "auto"
    device: str = "cpu"
    num_threads: int = 2
    kv_cache_bytes: int = 768 * 2**20
    block_size: int = 32
    max_sequence_tokens: int | None = None
    cuda_graphs: bool = False


class Runner(Protocol):
    """Runs one forward pass over a mixed batch. The fake that ships is `server.model.fake.FakeRunner`."""

    block_size: int
    num_blocks: int

    def copy(self, source: int, target: int) -> None:
        """Copy the whole content of a block to another one."""
        ...

    def run(self, rows: list[Row]) -> list[Sampled | None]:
        """Compute every row's tokens, write their KV, and sample and score as rows ask for it (else None), in order."""
        ...


class FusedCount(msgspec.Struct, frozen=True):
    """Parts of one kind: how many are fused, of how many that the base has."""

    fused: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.fused}/{self.total}"


class ForwardReport(msgspec.Struct, frozen=True, kw_only=True):
    """Report of how a loaded base is computed: the backend, and which parts of the model run as fused ones.

    `is_whole_decoder` says that all layers are one call of the backend, `is_direct` that the forward calls the
    embedding, the layers and the head itself, without transformers' code between them. A part that is not fused is
    computed by transformers' own module, which is right and slower. `rotary` names the rotary factors that were
    chosen by the longest sequence that is served, if they change with length (see `rotary_choice`).
    """

    backend: str
    precision: str
    num_threads: int
    num_layers: int
    attentions: FusedCount
    gated_blocks: FusedCount
    norms: FusedCount
    is_whole_decoder: bool
    is_direct: bool
    rotary: str = ""

    @property
    def is_fastest(self) -> bool:
        """Whether nothing of the fast path is lost."""
        return self.is_whole_decoder and self.is_direct

    def describe(self) -> str:
        """Write the report as one sentence for a log or a terminal, without a full stop."""
        decoder = "whole decoder" if self.is_whole_decoder else f"{self.num_layers} layers one by one"
        forward = "direct forward" if self.is_direct else "transformers' forward"
        threads = f"{self.num_threads} thread{'s' if self.num_threads != 1 else ''}"
        return (
            f"{self.backend} backend, {self.precision}, {threads}: {self.attentions} attentions, "
            f"{self.gated_blocks} gated blocks, {self.norms} norms fused, {decoder}, {forward}"
        )


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter that a sequence uses; `num_virtual` positions of its prefix come before the prompt."""

    digest: str
    weight: float = 1.0
    num_virtual: int = 0


class EngineFailure(msgspec.Struct):
    """The reason why a sequence ended without a finish: `code` is one of server/errors.py's codes."""

    code: str
    message: str


class Timing(msgspec.Struct):
    """Milliseconds: waiting in the queue (loading excluded), waiting for an adapter, until the first token."""

    queued_ms: float = 0.0
    load_ms: float = 0.0
    ttft_ms: float = 0.0
