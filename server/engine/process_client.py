"""An `EngineClient` over an engine process, which it starts, watches and restarts.

If the engine dies or hangs, another one is forked from the process that holds the base, after a wait that doubles with
each death in a row, and goes on with the running requests, as `server.engine.in_flight` says. If engines die in a row
that answered nothing, or one cannot start, the base is loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence

import msgspec

from server.core import EngineFailure
from server.engine.client import EngineStartError, EngineUnavailable
from server.engine.engine_process import EngineParent, EngineProcess, Patience
from server.engine.in_flight import STOPPED, InFlight, Request
from server.engine.messages import (
    Abort,
    AskResidency,
    Discard,
    EngineConfig,
    FromEngine,
    KeepResident,
    Output,
    Ready,
    Renew,
    Residency,
    Stage,
    StartFailed,
    Stats,
    StepDone,
    Submit,
)
from server.together import for_ever

log = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "server.engine.worker")
MAX_MUTE = 3  # engines in a row that die without an answer, before the process that they are forked from is replaced


class ProcessEngineClient:
    """Starts `command` with the socket's descriptor and speaks the messages of `server.engine.messages` with it."""

    def __init__(
        self, config: EngineConfig, *, command: Sequence[str] = ENGINE_COMMAND, patience: Patience | None = None
    ) -> None:
        self.config = config
        self.ready: Ready | None = None
        self.last_error: str | None = None
        self.stats = Stats()
        self.num_starts = 0
        self._num_deaths = self._num_resumed = 0
        self._command = tuple(command)
        self._patience = patience or Patience()
        self._parent: EngineParent | None = None
        self._engine: EngineProcess | None = None
        self._starting: asyncio.Task[Ready] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.in_flight = InFlight()
        self._has_news = asyncio.Event()  # an engine is ready, or the client is closed
        self._is_closed = False
        self._wait, self._back_at = self._patience.first_retry, 0.0
        self._load_s, self._fork_s = 0.0, 1.0  # that the last start of either kind took
        self._resident: list[str] = []
        self._query_ids = itertools.count()
        self._queries: dict[int, asyncio.Future[dict[str, str]]] = {}
        self._reapers: set[asyncio.Task[None]] = set()

    @property
    def retry_after_s(self) -> int:
        """Do as `EngineClient.retry_after_s` says."""
        return max(1, math.ceil(self._back_at - time.monotonic()))

    @property
    def pid(self) -> int | None:
        """The engine's process id; None if no engine is connected."""
        return None if self._engine is None else self._engine.child.pid

    async def start(self) -> Ready:
        """Start the first engine and the task that keeps one alive, or wait for a start that is under way.

        Returns what the engine said of itself. Raises `EngineStartError`, also if the client is closed meanwhile.
        """
        if self._is_closed:
            raise EngineStartError("the engine was closed before it was started")
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(), name="engine start")
        try:
            return await self._starting
        except asyncio.CancelledError:
            if self._is_closed:
                raise EngineStartError("the engine was closed before it was ready") from None
            raise

    async def _start(self) -> Ready:
        engine, ready = await self._begin()
        self._keeper = for_ever(self._keep(engine), "the keeper of the engine")
        return ready

    async def close(self) -> None:
        """End the engine process and the task that restarts it; both are gone on return."""
        self._is_closed = True
        self._has_news.set()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if self._engine is not None:  # the keeper was cancelled before its first step
            await self._drop(self._engine)
        await self._end_parent()
        self.last_error = "the engine is closed"
        await asyncio.gather(*self._reapers)

    async def generate(self, submit: Submit) -> AsyncGenerator[Output]:
        """Do as `EngineClient.generate` says."""
        if self.ready is None or self._engine is None:
            raise EngineUnavailable(self.last_error or "the engine is starting")
        request, is_over = self.in_flight.add(submit), False
        try:
            self._send(request, submit)
            while not is_over:
                output = await request.outputs.get() or await self._resume(request)
                is_over = request.note(output)
                yield output
        finally:
            self.in_flight.remove(request)
            if request.is_running and self._engine is not None:
                self._engine.write(Abort(submit.sequence_id))

    async def _resume(self, request: Request) -> Output:
        """Return the next output of a request whose engine died, or its failure."""
        sequence_id, loop = request.submit.sequence_id, asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(loop.time() + request.submit.deadline - time.monotonic()):
                while (failure := STOPPED if self._is_closed else request.refusal()) is None:
                    async with self.in_flight.trial:
                        if (output := await self._try_alone(request)) is not None:
                            return output
        except TimeoutError:
            failure = EngineFailure("deadline_exceeded", "no engine could end this request before its deadline")
        return Output(sequence_id, failure=failure)

    async def _try_alone(self, request: Request) -> Output | None:
        """Send a request to the next engine, and return its next output; None if that engine dies first, too."""
        await self._has_news.wait()
        if self._engine is None:
            return None
        self.in_flight.begin_trial(request)
        self._send(request, request.resumed())
        self._num_resumed += 1
        return await request.outputs.get()

    def _send(self, request: Request, submit: Submit) -> None:
        if self._engine is not None:
            request.is_running = True
            self._engine.write(submit)

    def discard(self, digest: str) -> None:
        """Do as `EngineClient.discard` says."""
        if self._engine is not None:
            self._engine.write(Discard(digest))

    def stage(self, digest: str, folder: str | None) -> None:
        """Do as `EngineClient.stage` says."""
        if self._engine is not None:
            self._engine.write(Stage(digest, folder))

    def keep_resident(self, digests: list[str]) -> None:
        """Do as `EngineClient.keep_resident` says; a restarted engine is sent the list, too."""
        if digests != self._resident:
            self._resident = digests
            if self.ready is not None and self._engine is not None:
                self._engine.write(KeepResident(digests))

    def renew(self, digest: str) -> None:
        """Do as `EngineClient.renew` says."""
        if self._engine is not None:
            self._engine.write(Renew(digest))

    async def residency(self) -> dict[str, str]:
        """Do as `EngineClient.residency` says."""
        if self.ready is None or self._engine is None:
            return {}
        query_id = next(self._query_ids)
        answer = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            self._engine.write(AskResidency(query_id))
            states: dict[str, str] = await answer
            return states
        finally:
            del self._queries[query_id]

    async def _keep(self, first: EngineProcess) -> None:
        """Relay one engine's messages after another's until cancelled."""
        engine: EngineProcess | None = first
        num_mute = 0
        while True:
            if engine is not None:
                await self._relay_all(engine)
                num_mute = 0 if engine.has_answered else num_mute + 1
                if engine.is_parent or num_mute >= MAX_MUTE:
                    num_mute = 0
                    await self._end_parent()
            self._estimate_return()
            log.error("the engine is gone; a new one starts", extra={"reason": self.last_error, "wait_s": self._wait})
            await asyncio.sleep(self._wait)
            self._wait = min(2 * self._wait, self._patience.max_retry)
            engine = None
            with contextlib.suppress(EngineStartError, OSError):  # it is in last_error, and the next try comes
                engine, _ = await self._begin()

    def _estimate_return(self) -> None:
        is_forked = self._parent is not None and not self._parent.has_ended
        self._back_at = time.monotonic() + self._wait + (self._fork_s if is_forked else self._load_s)

    async def _relay_all(self, engine: EngineProcess) -> None:
        """Relay the engine's messages until it is dead; one that lived well resets the wait for the next one."""
        began = time.monotonic()
        watchdog = asyncio.create_task(engine.watch(self._patience), name="engine watchdog")
        try:
            while (message := await engine.read()) is not None:
                self._relay(message)
            self.last_error = engine.verdict or "the engine process died"
        except (OSError, msgspec.MsgspecError) as error:
            self.last_error = engine.verdict or f"the connection to the engine broke: {error}"
        finally:
            watchdog.cancel()
            if time.monotonic() - began >= self._patience.good_life:
                self._wait = self._patience.first_retry
            await self._drop(engine)

    async def _drop(self, engine: EngineProcess) -> None:
        if not self._is_closed:
            self._has_news.clear()
        self.ready = self._engine = None
        self._estimate_return()
        self._num_deaths += 1
        self._count(Stats())
        self.in_flight.lose()
        for query_id in self._queries:
            self._answer(query_id, {})
        await self._finish(engine.end())

    def _relay(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            self._count(message.stats)
            for output in message.outputs:
                self.in_flight.deliver(output)
        elif isinstance(message, Residency):
            self._answer(message.query_id, message.states)

    def _count(self, stats: Stats) -> None:
        """Keep an engine's stats, with the counts of this process."""
        stats.deaths_total, stats.resumed_requests_total = self._num_deaths, self._num_resumed
        self.stats = stats

    def _answer(self, query_id: int, states: dict[str, str]) -> None:
        query = self._queries.get(query_id)
        if query is not None and not query.done():
            query.set_result(states)

    async def _begin(self) -> tuple[EngineProcess, Ready]:
        """Start an engine and wait until it is ready. Raises `EngineStartError` after all processes were removed."""
        self.num_starts += 1
        began = time.monotonic()
        engine = None
        try:
            if self._parent is None or self._parent.has_ended:
                await self._end_parent()
                self._parent = await EngineParent.start(self._command, self.config)
            is_first = self._parent.num_engines == 0
            limit = self._patience.loading if is_first else self._patience.forking
            async with _limited(limit):
                engine = await self._parent.spawn(self._patience)
                ready = await _first_message(engine)
        except BaseException as error:
            self.last_error = str(error)
            if engine is not None:
                await self._finish(engine.end())
            await self._end_parent()
            raise
        self._engine, self.ready, self.last_error = engine, ready, None
        if is_first:
            self._load_s = time.monotonic() - began
        else:
            self._fork_s = time.monotonic() - began
        if self._resident:
            engine.write(KeepResident(self._resident))
        self._has_news.set()
        return engine, ready

    async def _end_parent(self) -> None:
        parent, self._parent = self._parent, None
        if parent is not None:
            await self._finish(parent.end(self._patience.closing))

    async def _finish(self, ending: Coroutine[None, None, None]) -> None:
        """Wait for the end of a process, which comes even if the caller is cancelled meanwhile."""
        reaper = asyncio.create_task(ending)
        self._reapers.add(reaper)
        reaper.add_done_callback(self._reapers.discard)
        await asyncio.shield(reaper)


@contextlib.asynccontextmanager
async def _limited(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineStartError(f"the engine did not load within {seconds:g} s") from None


async def _first_message(engine: EngineProcess) -> Ready:
    """Read that the engine is ready. Raises `EngineStartError` if it says anything else."""
    try:
        message = await engine.read()
    except OSError:  # it ended with our frame unread
        message = None
    except msgspec.MsgspecError as error:
        raise EngineStartError(f"the engine's first frame cannot be read: {error}") from error
    if isinstance(message, Ready):
        return message
    if isinstance(message, StartFailed):
        raise EngineStartError(message.message)
    raise EngineStartError("the engine process ended before it was ready; see its log")
