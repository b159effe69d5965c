"""Routes in the form of LoRAX and TGI (Hugging Face's text-generation-inference), as their clients ask."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from server.api import openai_fields
from server.api.body import BodyObject, read_object
from server.api.deps import caller_of, counted_callers, state_of
from server.api.document import COUNTED, EVERYWHERE, GENERATES, errors, says_streamed
from server.api.model_name import adapters_of
from server.api.openai_fields import Tolerant
from server.api.respond import respond
from server.api.structured_outputs import Grammar, LoraxFormat, only_form
from server.api.text_generation_answers import TextGenerationAnswer, TextGenerationError, TextGenerationEvent
from server.api.text_generation_form import Details, TextGenerationForm
from server.core import AskedForm, Sampling
from server.errors import InvalidFieldError
from server.requests.auth import GENERATE, Caller
from server.requests.spec import GenerationSpec
from server.schemas import BASE, MIN_TEMPERATURE, Stop, openapi_body

LORAX_BASE = "__base_model__"  # LoRAX's name of the base
MAX_TOP = 20


def speak_text_generation(request: Request) -> None:
    """Let the request's errors be written in the form of LoRAX and TGI."""
    request.state.is_text_generation = True


router = APIRouter(
    tags=["LoRAX and TGI"],
    dependencies=[Depends(speak_text_generation), *counted_callers(GENERATE)],
    responses=errors(*EVERYWHERE, *COUNTED, *GENERATES, 422, also=TextGenerationError),
)


class TextGenerationParameters(Tolerant):
    """Parameters of a generation: TGI's, and what LoRAX has besides."""

    neutral = openai_fields.TEXT_GENERATION
    adapter_id: str | None = None
    do_sample: bool = False
    max_new_tokens: int = Field(100, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, lt=2**31)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: Annotated[list[Stop], Field(max_length=4)] = Field(default_factory=list)
    ignore_eos_token: bool = False
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: bool = False
    top_n_tokens: int = Field(0, ge=0, le=MAX_TOP)
    return_k_alternatives: int = Field(0, ge=0, le=MAX_TOP)
    grammar: Grammar | None = None
    response_format: LoraxFormat | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn: also if a parameter is there that is for drawing, but not at temperature 0."""
        is_shaped = self.temperature != 1 or self.top_k > 0 or self.top_p < 1
        return (self.do_sample or is_shaped) and self.temperature >= MIN_TEMPERATURE

    def sampling(self) -> Sampling:
        """The engine's form of these parameters; a seed is drawn if none was given."""
        return Sampling(
            temperature=self.temperature if self.is_sampled else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            ignore_eos=self.ignore_eos_token,
        )

    def form(self) -> AskedForm | None:
        """The form that the request names, or None. Raises `InvalidFieldError` for two of them."""
        given = (("response_format", self.response_format), ("grammar", self.grammar))
        return only_form(None if one is None else one.form(f"parameters.{field}") for field, one in given)

    def named(self) -> frozenset[str]:
        """The sampling fields that were named; `do_sample` says of the temperature whether there is one."""
        fields = self.model_fields_set
        return frozenset(fields | ({"temperature"} if "do_sample" in fields or self.is_sampled else set()))


class TextGenerationRequest(Tolerant):
    """The body of LoRAX's and TGI's routes."""

    inputs: str = Field(min_length=1)
    parameters: TextGenerationParameters = Field(default_factory=TextGenerationParameters)
    stream: bool = False


@router.post(
    "/",
    openapi_extra=openapi_body(TextGenerationRequest),
    responses=says_streamed((TextGenerationEvent,), TextGenerationError, whole=list[TextGenerationAnswer]),
)
async def generate_compat(request: Request, task: str | None = None) -> Response:
    """Answer in the form of LoRAX and TGI: a list of one, or a stream if the body says so. Their clients ask here."""
    body = await read_object(request, state_of(request))
    return await answer(request, task, body, is_listed=True)


@router.post(
    "/generate_stream",
    response_class=Response,
    openapi_extra=openapi_body(TextGenerationRequest),
    responses=says_streamed((TextGenerationEvent,), TextGenerationError),
)
async def generate_stream(request: Request, task: str | None = None) -> Response:
    """Answer token by token in the form of LoRAX and TGI."""
    body = await read_object(request, state_of(request))
    return await answer(request, task, body, is_stream=True)


async def answer(
    request: Request, task: str | None, body: BodyObject, *, is_stream: bool = False, is_listed: bool = False
) -> Response:
    """The response to a body with `inputs`, which is a stream if the route or the body says so."""
    state = state_of(request)
    speak_text_generation(request)
    asked = await body.read_as(TextGenerationRequest)
    is_stream = is_stream or asked.stream
    spec = _spec(caller_of(request), task, asked, is_stream)
    parameters = asked.parameters
    details = Details(
        is_told=parameters.details or parameters.decoder_input_details,
        num_top=parameters.top_n_tokens,
        num_alternatives=parameters.return_k_alternatives,
        lead=asked.inputs if parameters.return_full_text else "",
    )
    form = TextGenerationForm(state.tokenizer, details, is_listed)
    return await respond(request, state.generation, spec, form, is_stream)


def _spec(caller: Caller, task: str | None, asked: TextGenerationRequest, is_stream: bool) -> GenerationSpec:
    """The spec of a body. Raises `InvalidFieldError` if it names another task than the query, or cannot be streamed."""
    parameters = asked.parameters
    if parameters.decoder_input_details and is_stream:
        raise InvalidFieldError(
            "parameters.decoder_input_details: a stream does not tell the prompt's tokens: leave it out, or ask for "
            "the whole answer",
            "parameters.decoder_input_details",
        )
    has_tokens = is_stream or parameters.details or parameters.decoder_input_details
    return GenerationSpec(
        tenant=caller.tenant,
        limits=caller.limits,
        **_adapters(task, parameters.adapter_id),
        texts=[asked.inputs],
        prompt_field="inputs",
        sampling=parameters.sampling(),
        named=parameters.named(),
        max_tokens=parameters.max_new_tokens,
        stop=parameters.stop,
        has_logprobs=has_tokens,
        top_logprobs=max(parameters.top_n_tokens, parameters.return_k_alternatives) if has_tokens else None,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        form=parameters.form(),
    )


def _adapters(task: str | None, adapter_id: str | None) -> dict[str, Any]:
    """The fields of a spec that say who answers: in this dialect a body that names no adapter asks for the base."""
    named = BASE if adapter_id == LORAX_BASE else adapter_id
    if None not in (task, named) and task != named:
        raise InvalidFieldError(
            f"parameters.adapter_id: the query names the task {(task or '')[:63]}: send one of the two",
            "parameters.adapter_id",
        )
    return adapters_of(next((one for one in (named, task) if one is not None), BASE), None, None)
