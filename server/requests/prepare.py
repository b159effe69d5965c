"""Prepare a resolved request for the engine: encode its prompts, check their length, complete its sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec
from jinja2 import TemplateError

from adapters_store.base.turns import ControlTextError, ToolsRefusedError
from adapters_store.form import lead_before
from adapters_store.format.manifest import ToolFormatName
from adapters_store.tools.formats import FORMATS, ToolFormat, format_in, reasoning_in, to_json
from adapters_store.tools.parser import AnswerFormat
from adapters_store.tools.turns import AnyTurn, Tools, ToolTurn
from server.core import FormSpec, Sampling
from server.engine.client import EngineClient, require_ready
from server.engine.grammar import grammar_of, of_task
from server.engine.messages import Ready
from server.errors import BadRequestError, ContextLengthError, InvalidFieldError
from server.requests.answer import GenerationJob
from server.requests.call_grammar import parts_form
from server.requests.resolve import ResolvedAdapters
from server.requests.spec import GenerationSpec
from server.requests.tokenizer import Tokenizer
from server.tenant_work import TenantWork

MAX_ANSWER_BYTES = 256 * 2**20  # of JSON, which is held until it is sent
TOKEN_BYTES, LOGPROB_BYTES = 16, 128  # of a token's text and id, and of a token with its log-probability
NUM_OPENING = 16  # tokens at a prompt's end that may open the reasoning
MAX_SCORED_LABELS = 256  # of a request, behind all of its prompts
THREAD_CHARS = 4000  # longer texts are tokenised off the event loop


class JobPreparer:
    """Makes jobs out of specs, by the base's tokenizer and the engine's limits."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        tenant_work: TenantWork,
        tool_format: ToolFormatName | None = None,
    ) -> None:
        self._client, self._tokenizer, self._tenant_work = client, tokenizer, tenant_work
        self._tool_format = tool_format  # of the base, if its template does not show it

    async def prepare(self, spec: GenerationSpec, resolved: ResolvedAdapters) -> GenerationJob:
        """The job that a spec asks for. Raises `ServerError` for one that can never run here, before it queues."""
        spec = replace(spec, sampling=msgspec.structs.replace(spec.sampling, **resolved.defaults(spec.named)))
        scored_from = None
        if spec.continuations is None:
            prompts = await self.encode(spec, resolved)
        else:
            prompts, scored_from = await self._continued(spec, spec.continuations)
        max_tokens = spec.max_tokens
        if max_tokens is None:
            ready = require_ready(self._client)
            room = ready.max_sequence_tokens - resolved.num_virtual - len(prompts[0])
            max_tokens = max(1, min(room, max_answer_tokens(spec, len(prompts))))
        field = spec.prompt_field if scored_from is None else "continuations"
        check_length(require_ready(self._client), resolved, prompts, max_tokens, field)
        check_answer_size(spec, prompts, max_tokens)
        sampling = complete_sampling(require_ready(self._client), spec, max_tokens, self._ends(spec, resolved))
        parts = self._answer_format(spec, resolved, prompts[0]) if spec.is_parsed else None
        grammar, lead = await self._form(spec, resolved, parts)
        labels = self._labels(spec, resolved, prompts, lead) if spec.label_probs else {}
        tells_prompts = spec.echo or spec.prompt_logprobs is not None
        return GenerationJob(
            resolved, prompts, sampling, spec.n, spec.stop, spec.timeout_s, limits=spec.limits, lead=lead,
            tells_prompts=tells_prompts, scored_from=scored_from, form=grammar, answer_format=parts,
            labels=labels,
        )  # fmt: skip

    async def _form(
        self, spec: GenerationSpec, resolved: ResolvedAdapters, parts: AnswerFormat | None
    ) -> tuple[str | None, str]:
        """The grammar of the answers, if they have a form, and the text that is taken off the beginning of each one.

        Raises `BadRequestError` if this base serves no forms, or the form can end no answer.
        """
        lead = "" if spec.turns is None else self._tokenizer.turns.lead(resolved.prompt_format)
        form = form_of(spec, resolved)
        if form is None and not spec.has_held_calls:
            return None, lead
        self._check_form(spec, "tools" if form is None else form.field)
        if form is not None and spec.must_call is None:
            lead = lead_before(form.kind, form.value, "" if spec.echo else lead or resolved.lead)
        if parts is not None:
            return await self._tenant_work.run(self._grammar_of_parts, spec, form, parts, lead), lead
        return None if form is None else await self._tenant_work.run(grammar_of, form, lead), lead

    def _grammar_of_parts(self, spec: GenerationSpec, form: FormSpec | None, parts: AnswerFormat, lead: str) -> str:
        """The grammar of an answer whose content has a form, or whose calls are held to their schemas."""
        if spec.must_call:
            parts = replace(parts, functions={spec.must_call: parts.functions[spec.must_call]})
        # Each by itself first, so that what is wrong with it is said of its own field.
        for number, tool in enumerate(spec.tools):
            if tool["name"] in parts.functions:
                grammar_of(FormSpec("json_schema", tool["parameters"], f"tools.{number}.{spec.parameters_field}"))
        if form is not None:
            grammar_of(form)
        return grammar_of(parts_form(parts, form, spec.must_call is not None, self._tokenizer.special_id, lead))

    def _check_form(self, spec: GenerationSpec, field: str) -> None:
        """Refuse a form that this base cannot be held to, or that can end no answer."""
        if not require_ready(self._client).has_forms:
            raise BadRequestError("this base's tokenizer serves no forms: ask for free text", field)
        if spec.sampling.ignore_eos:
            raise BadRequestError(
                "an answer in a form ends where the form does: leave ignore_eos out, or ask for free text by "
                'response_format {"type": "text"}',
                "ignore_eos",
            )

    def _labels(
        self, spec: GenerationSpec, resolved: ResolvedAdapters, prompts: list[list[int]], lead: str
    ) -> dict[str, list[int]]:
        """The labels of the answers' form, each with its tokens behind a prompt.

        Raises `ServerError` if the form has no labels, or they are too many or too long.
        """
        form = form_of(spec, resolved)
        if form is None or form.kind != "choice" or spec.must_call is not None:
            raise BadRequestError(
                'label_probs are of a form of labels: send response_format {"type": "choice", "choices": [...]}, or '
                "ask a task whose form has labels",
                "label_probs",
            )
        with control_text_is_400("label_probs"):
            labels = {label: self._tokenizer.encode_behind(lead + label) for label in form.value}
        num_scored, max_queued = len(prompts) * len(labels), spec.limits.max_queued
        if max_queued is None:
            max_scored = MAX_SCORED_LABELS
        else:  # beside the choices
            max_scored = min(MAX_SCORED_LABELS, max(0, max_queued - len(prompts) * spec.n))
        if num_scored > max_scored:
            raise BadRequestError(
                f"label_probs of {len(labels)} labels behind {len(prompts)} prompts are {num_scored} scores, and a "
                f"request may have {max_scored}",
                "label_probs",
            )
        longest = max(labels.values(), key=len)
        wholes = [[*prompt, *longest] for prompt in prompts]
        check_length(require_ready(self._client), resolved, wholes, 0, "label_probs")
        return labels

    async def encode(self, spec: GenerationSpec, resolved: ResolvedAdapters) -> list[list[int]]:
        """Token ids of each of a spec's prompts. Raises `ServerError` for what has none, or can never fit."""
        if spec.token_ids is not None:
            return spec.token_ids
        if spec.turns is not None:
            return [await self._encode_chat(spec.turns, spec.tools, resolved, spec.prompt_field)]
        for text in spec.texts or []:
            self._check_bytes(text, spec.prompt_field)
        with control_text_is_400(spec.prompt_field):
            return await self._encode(spec.texts or [], spec.has_special)

    async def _continued(
        self, spec: GenerationSpec, continuations: list[str | list[int]]
    ) -> tuple[list[list[int]], list[int]]:
        """Tokens of the prompt with each continuation, and where each one begins.

        Texts are tokenised together: a continuation begins at the first token that has a character of it.
        """
        text = spec.texts[0] if spec.texts else ""
        for index, continuation in enumerate(continuations):
            if isinstance(continuation, str) and spec.token_ids:
                raise BadRequestError(
                    "after prompt_token_ids send token ids, or a prompt as text", f"continuations.{index}"
                )
            self._check_bytes(text + continuation if isinstance(continuation, str) else text, "continuations")
        given = [continuation for continuation in continuations if isinstance(continuation, str)]
        with control_text_is_400("continuations"):
            encoded = await self._encode([text, *(text + one for one in given)], spec.has_special)
        prompt, wholes = spec.token_ids[0] if spec.token_ids else encoded[0], iter(encoded[1:])
        prompts = [next(wholes) if isinstance(one, str) else [*prompt, *one] for one in continuations]
        starts = [common_length(prompt, whole) for whole in prompts]
        for index, (start, whole) in enumerate(zip(starts, prompts, strict=True)):
            if not 0 < start < len(whole):
                reason = "has no tokens of its own" if start else "has no token before it that it is scored by"
                raise BadRequestError(f"continuations.{index} {reason} behind this prompt", f"continuations.{index}")
        return prompts, starts

    def _ends(self, spec: GenerationSpec, resolved: ResolvedAdapters) -> tuple[int, ...]:
        """The tokens that end an answer beside the base's own.

        They are the request's, also those that it names by their text; and the adapters' and the tokenizer's, which
        `ignore_eos` passes over as it does the base's.
        """
        named = [self._tokenizer.special_id(text) for text in spec.stop]
        learned = {self._tokenizer.eos_token_id, *resolved.ends}.difference(require_ready(self._client).eos_token_ids)
        ends = [*spec.sampling.stop_token_ids, *named, *([] if spec.sampling.ignore_eos else learned)]
        return tuple(sorted({token_id for token_id in ends if token_id is not None}))

    def _check_bytes(self, text: str, param: str) -> None:
        """Refuse a text that no tokens can make fit, before it is tokenised: 4 MB take seconds."""
        max_tokens = require_ready(self._client).max_sequence_tokens
        if excess := self._tokenizer.excess(text, max_tokens):
            num_bytes, max_bytes = excess
            raise ContextLengthError(
                f"this model's maximum context length is {max_tokens} tokens: the {param} of {num_bytes} bytes cannot "
                f"fit them, which hold {max_bytes} bytes at most",
                param,
            )

    async def decode(self, token_ids: list[int], param: str) -> str:
        """The text of token ids. Raises `InvalidFieldError` of `param` for one outside the vocabulary."""
        check_tokens(require_ready(self._client), token_ids, param)
        return await self._tenant_work.run(self._tokenizer.decode, token_ids, False)

    async def _encode(self, texts: list[str], has_special: bool) -> list[list[int]]:
        def encode() -> list[list[int]]:
            return [self._tokenizer.encode(text, has_special) for text in texts]

        return await self._tenant_work.run(encode) if sum(map(len, texts)) > THREAD_CHARS else encode()

    def _written_format(self, resolved: ResolvedAdapters) -> ToolFormat | None:
        """The format that tools are written in, if it is not the base's template that writes them."""
        if (found := resolved.tool_format) is not None:
            return found
        is_templated = resolved.prompt_format is None and self._tokenizer.turns.takes_tools
        return None if is_templated or self._tool_format is None else FORMATS[self._tool_format]

    def _answer_format(
        self, spec: GenerationSpec, resolved: ResolvedAdapters, prompt: list[int]
    ) -> AnswerFormat | None:
        """The parts that answers have: calls if there are tools, and reasoning if adapter or base marks it."""
        encoder = self._tokenizer.turns
        reasoning = resolved.reasoning or (None if resolved.prompt_format else reasoning_in(encoder.template))
        if not spec.tools:
            form = None
        else:
            form = resolved.tool_format or FORMATS[self._tool_format or format_in(encoder.template)]
        if form is None and reasoning is None:
            return None
        before = self._tokenizer.decode(prompt[-NUM_OPENING:], skip_special=False)
        return AnswerFormat.of(form, spec.tools, reasoning, before, spec.is_parallel)

    async def _encode_chat(
        self, turns: Sequence[AnyTurn], tools: Tools, resolved: ResolvedAdapters, param: str
    ) -> list[int]:
        """Tokens of chat turns, in the adapter's format, or else by the base's template."""
        if resolved.prompt_format is None and not self._tokenizer.has_chat_template:
            raise BadRequestError("this base has no chat template: send a prompt", param)
        encoder = self._tokenizer.turns
        try:
            self._check_bytes(to_json(tools), "tools")
            needs_tools = bool(tools) or any(ToolTurn(*turn).needs_tools for turn in turns)
            tool_format = self._written_format(resolved) if needs_tools else None
            rendered = await self._tenant_work.run(encoder.render, turns, resolved.prompt_format, tools, tool_format)
            self._check_bytes("".join(rendered.pieces), param)
            with control_text_is_400(param):
                return await self._tenant_work.run(encoder.encode, rendered)
        except ToolsRefusedError as error:
            hint = "serve it with --tool-format, or leave tools and their calls out"
            raise BadRequestError(f"{error}: {hint}", "tools" if tools else param) from None
        except TemplateError as error:  # many templates refuse turns that do not alternate, or a system turn
            raise BadRequestError(f"the base's chat template refuses these messages: {error}", param) from None


def form_of(spec: GenerationSpec, resolved: ResolvedAdapters) -> FormSpec | None:
    """The form of a request's answers, if they have one: its own, or its adapters' unless it asks for free text."""
    is_answered = spec.continuations is None and (spec.max_tokens != 0 or spec.label_probs)
    if spec.form is None and resolved.form is not None and is_answered:
        return of_task(resolved.form)
    return spec.form if isinstance(spec.form, FormSpec) else None


def common_length(first: list[int], second: list[int]) -> int:
    """Return how many tokens two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


@contextmanager
def control_text_is_400(param: str) -> Iterator[None]:
    """Refuse a text that would become control tokens, naming the field."""
    try:
        yield
    except ControlTextError as error:
        raise BadRequestError(f"{param}: {error}", param) from None


def check_length(
    ready: Ready, resolved: ResolvedAdapters, prompts: list[list[int]], max_tokens: int, param: str
) -> None:
    """Refuse prompts (token ids) that could never fit. Virtual tokens take positions as a prompt's do.

    Raises `BadRequestError` for an empty prompt, `ContextLengthError` for a long one, `InvalidFieldError` for a token
    outside the vocabulary; `param` is the field that they came in.
    """
    for prompt in prompts:
        if not prompt:
            raise BadRequestError("the prompt has no tokens", param)
        check_tokens(ready, prompt, param)
        if len(prompt) + resolved.num_virtual + max_tokens > ready.max_sequence_tokens:
            virtual = (
                f", its adapters put {resolved.num_virtual} virtual tokens before it," if resolved.num_virtual else ""
            )
            raise ContextLengthError(
                f"this model's maximum context length is {ready.max_sequence_tokens} tokens: the prompt has "
                f"{len(prompt)} tokens{virtual} and max_tokens is {max_tokens}",
                param,
            )


def check_tokens(ready: Ready, token_ids: list[int], param: str) -> None:
    """Raise `InvalidFieldError` of `param` for a token outside the vocabulary."""
    if token_ids and max(token_ids) >= ready.spec.vocab_size:
        raise InvalidFieldError(f"{param} has a token over {ready.spec.vocab_size - 1}", param)


def bytes_of_a_step(spec: GenerationSpec, num_prompts: int) -> int:
    """Bytes of an answer for each token that all its choices have."""
    return num_prompts * spec.n * (TOKEN_BYTES + _num_logprobs(spec) * LOGPROB_BYTES)


def max_answer_tokens(spec: GenerationSpec, num_prompts: int) -> int:
    """The most tokens a choice with which an answer has at most `MAX_ANSWER_BYTES`."""
    return MAX_ANSWER_BYTES // bytes_of_a_step(spec, num_prompts)


def _num_logprobs(spec: GenerationSpec) -> int:
    return 1 + (spec.top_logprobs or 0) if spec.has_logprobs else 0


def check_answer_size(spec: GenerationSpec, prompts: list[list[int]], max_tokens: int) -> None:
    """Refuse a request whose answer could have more than `MAX_ANSWER_BYTES`. Raises `BadRequestError`."""
    num_logprobs, num_scores = _num_logprobs(spec), 0 if spec.prompt_logprobs is None else 1 + spec.prompt_logprobs
    num_told = sum(map(len, prompts)) if spec.echo or num_scores else 0
    num_bytes = max_tokens * bytes_of_a_step(spec, len(prompts))
    num_bytes += spec.n * num_told * (TOKEN_BYTES + num_scores * LOGPROB_BYTES)
    if num_bytes > MAX_ANSWER_BYTES:
        raise BadRequestError(
            f"the answer could have {num_bytes // 2**20} MiB, and an answer may have {MAX_ANSWER_BYTES // 2**20}: "
            f"{len(prompts)} prompts, each with n={spec.n} answers of max_tokens={max_tokens}, each token with "
            f"{num_logprobs} log-probabilities, and {num_told} tokens of prompts with {num_scores}; ask for less "
            "of one of them",
            "logprobs" if num_logprobs else "prompt_logprobs" if num_scores else "n",
        )


def complete_sampling(ready: Ready, spec: GenerationSpec, max_tokens: int, ends: tuple[int, ...]) -> Sampling:
    """The spec's sampling with its ends, token and logprob counts. Raises `InvalidFieldError` for the impossible."""
    if spec.top_logprobs and not spec.has_logprobs:
        raise InvalidFieldError("top_logprobs needs logprobs: true", "top_logprobs")
    for name in ("logit_bias", "stop_token_ids"):
        if any(token >= ready.spec.vocab_size for token in getattr(spec.sampling, name)):
            raise InvalidFieldError(f"{name} names a token over {ready.spec.vocab_size - 1}", name)
    logprobs = (spec.top_logprobs or 0) if spec.has_logprobs else None
    return msgspec.structs.replace(
        spec.sampling,
        max_tokens=max_tokens,
        logprobs=logprobs,
        stop_token_ids=ends,
        prompt_logprobs=spec.prompt_logprobs,
    )
