"""Run a job's choices in the engine, all at once, and turn their tokens into chunks of text."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from adapters_store.tools.parser import AnswerParser
from server.core import EngineFailure
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.messages import Output, Submit
from server.errors import EngineFailedError, UnavailableError
from server.metrics import Metrics
from server.requests.answer import Chunk, GenerationJob, GenerationState, ReadPrompt
from server.requests.detokenizer import TextStream
from server.requests.tokenizer import Tokenizer
from server.uploads.revalidation import Revalidation

GRACE_S = 5.0  # the engine ends what is late; this process does if the engine is stuck
Queue = asyncio.Queue[Chunk | Exception]


class ChoiceRunner:
    """Runs each choice of a job as one sequence of the engine, once its adapters are validated."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, metrics: Metrics, revalidation: Revalidation
    ) -> None:
        self._client, self._tokenizer = client, tokenizer
        self._metrics, self._revalidation = metrics, revalidation

    async def run_choices(self, job: GenerationJob, progress: GenerationState) -> AsyncGenerator[Chunk]:
        """Chunks of all choices as they come, counted in `progress`. An error of one choice, or closing, ends all."""
        queue: Queue = asyncio.Queue()
        choices = [asyncio.create_task(self._feed(job, progress, index, queue)) for index in range(job.num_choices)]
        scored = dict[int, asyncio.Task[dict[str, float]]]()  # the labels of a prompt
        try:
            while progress.ended < len(choices):
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                prompt = item.index // job.n
                if job.labels and prompt not in scored:  # it is computed now, and labels begin from it
                    scored[prompt] = asyncio.create_task(self._label_probs(job, progress, prompt))
                if job.labels and item.finish_reason is not None:
                    item.label_probs = await scored[prompt]
                progress.ended += item.finish_reason is not None
                yield item
        finally:
            await _cancel([*choices, *scored.values()])

    async def _feed(self, job: GenerationJob, progress: GenerationState, index: int, queue: Queue) -> None:
        """Put the chunks of one choice into the queue, or the error that ended it."""
        try:
            async with self._bounded(job):
                for digest in job.resolved.digests:
                    await self._revalidation.ensure_validated(digest)
                await self._run_choice(job, progress, index, queue)
        except Exception as error:  # noqa: BLE001 - whatever it is, `run_choices` raises it to its caller
            queue.put_nowait(error)

    def _text(self, job: GenerationJob, prompt: ReadPrompt) -> TextStream:
        """The text of an answer to a prompt; special tokens that mark parts of answers are shown by name."""
        marks = () if job.answer_format is None else job.answer_format.marks
        shown = {token_id: mark for mark in marks if (token_id := self._tokenizer.special_id(mark)) is not None}
        return TextStream(self._tokenizer, job.stop, prompt.token_ids, job.lead, shown)

    @asynccontextmanager
    async def _bounded(self, job: GenerationJob) -> AsyncIterator[None]:
        """Run the block no longer than the job may take. Raises `ServerError` for that, or for no engine."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.timeout_s + GRACE_S):
                yield
        except TimeoutError:
            failure = EngineFailure("deadline_exceeded", f"no answer within {job.timeout_s:g} s")
            raise EngineFailedError(failure) from None
        except EngineUnavailable as error:
            raise UnavailableError(str(error), retry_after=self._client.retry_after_s) from None

    async def _label_probs(self, job: GenerationJob, progress: GenerationState, prompt: int) -> dict[str, float]:
        """The probability of each label behind a prompt: that of its tokens, as a share of all labels'."""
        token_ids = job.prompts[prompt]
        scores = [
            asyncio.create_task(self._score(job.submit_label(token_ids, label), progress)) for label in job.labels
        ]
        try:
            async with self._bounded(job):
                logprobs = await asyncio.gather(*scores)
        finally:
            await _cancel(scores)
        weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
        return {label: weight / sum(weights) for label, weight in zip(job.labels, weights, strict=True)}

    async def _score(self, submit: Submit, progress: GenerationState) -> float:
        """The log-probability of the tokens that a sequence scores."""
        logprob = 0.0
        async with aclosing(self._client.generate(submit)) as outputs:
            async for output in outputs:
                if output.failure is not None:
                    raise EngineFailedError(output.failure, self._client.retry_after_s)
                progress.num_begun += output.timing is not None
                logprob += sum(score.chosen for score in output.scores)
                if output.finish_reason is not None:
                    break
        return logprob

    async def _run_choice(self, job: GenerationJob, progress: GenerationState, index: int, queue: Queue) -> None:
        prompt = ReadPrompt(job.prompts[index // job.n])
        text, is_told = self._text(job, prompt), not job.tells_prompts
        parser = None if job.answer_format is None else AnswerParser(job.answer_format)
        label, last = self._metrics.label(job.resolved.tenant, job.resolved.label), 0.0
        async with aclosing(self._client.generate(job.submit(index))) as outputs:
            async for output in outputs:
                now = time.monotonic()
                if output.failure is not None:
                    raise EngineFailedError(output.failure, self._client.retry_after_s)
                if last and output.token_ids:
                    self._metrics.gap.labels(*label).observe(now - last)
                    self._metrics.vllm.gap.observe(now - last)
                last = now if output.token_ids else last
                prompt.scores += output.scores
                chunk = _chunk(index, output, text)
                if parser is not None:
                    _parse(chunk, parser)
                if not is_told and (output.token_ids or output.finish_reason is not None):
                    chunk.prompt, is_told = prompt, True
                progress.count(index // job.n, output, chunk)
                progress.total_ms = (now - job.arrived) * 1000
                queue.put_nowait(chunk)
                if chunk.finish_reason is not None:
                    return  # closing the outputs aborts a sequence that a stop text ended


def _parse(chunk: Chunk, parser: AnswerParser) -> None:
    """Cut a chunk's text into parts. An answer with calls that ends by itself has them for its reason."""
    chunk.parts = parser.push(chunk.text)
    if chunk.finish_reason is not None and not parser.has_ended:
        chunk.parts += parser.finish()
    if parser.has_ended or (chunk.finish_reason == "stop" and parser.num_calls):
        chunk.finish_reason = "tool_calls"


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _chunk(index: int, output: Output, text: TextStream) -> Chunk:
    """The text of an output's tokens, up to a stop text. The token that ends an answer has none, special or not."""
    chunk = Chunk(index, "", [], [], output.finish_reason)
    num_shown = len(output.token_ids) - (output.finish_reason == "stop")
    for at, token_id in enumerate(output.token_ids):
        chunk.text += text.push(token_id) if at < num_shown else ""
        chunk.token_ids.append(token_id)
        chunk.logprobs += output.logprobs[at : at + 1]
        if text.is_stopped:
            break
    if chunk.finish_reason is not None and not text.is_stopped:
        chunk.text += text.flush()
    if text.is_stopped:
        chunk.finish_reason, chunk.is_stopped = "stop", True
    return chunk
