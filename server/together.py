"""Run coroutines at once, as one, or for as long as the process runs: no failure is left unseen."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Results in order. If one fails, the others are cancelled and its error is raised as it is, in no group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def for_ever(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a task without which the server is of no use: if it fails, the process is told to end, with the reason."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_end_process_if_failed)
    return task


def _end_process_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s failed; the server ends", task.get_name(), exc_info=error)
        signal.raise_signal(signal.SIGTERM)
