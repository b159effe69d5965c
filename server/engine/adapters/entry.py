"""The engine's record of an adapter: its users, its copies, and the failures of its loads.

A load that fails is tried again after a back-off that doubles each time. After `MAX_FAILURES` in a row the adapter is
quarantined: it is tried again only after `QUARANTINE_S`. If the stored bytes are corrupt it is quarantined at once, and
until it is uploaded again. A store that does not answer is no fault of the adapter: it is never quarantined for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Generic

from adapters_store.errors import StoreDownError
from server.core import EngineFailure
from server.engine.adapters.load_queue import P

FIRST_RETRY_S, MAX_RETRY_S = 1.0, 60.0
MAX_OUTAGE_RETRY_S = 8.0  # while the store does not answer
MAX_FAILURES = 5  # in a row
QUARANTINE_S = 600.0  # corrupt bytes wait to be uploaded again
CORRUPT = "artifact_corrupt"
OUTAGE = StoreDownError.code


@dataclass
class AdapterEntry(Generic[P]):
    """The state of one digest. `num_users` are sequences from submit to finish, `num_pins` those that run."""

    num_users: int = 0
    num_pins: int = 0
    packed: P | None = None  # the copy in host memory
    slot: int | None = None
    num_bytes: int | None = None  # known after the first load
    is_loading: bool = False
    is_discarded: bool = False
    failure: EngineFailure | None = None
    num_failures: int = 0  # in a row
    is_quarantined: bool = False
    retry_at: float = 0.0  # monotonic seconds

    @property
    def state(self) -> str | None:
        """The first of `slot`, `host`, `loading`, `quarantined` and `failed` that is true; None is absent."""
        states = {
            "slot": self.slot is not None,
            "host": self.packed is not None,
            "loading": self.is_loading,
            "quarantined": self.is_quarantined,
            "failed": self.failure is not None,
        }
        return next((state for state, is_so in states.items() if is_so), None)

    def is_failed(self, now: float) -> bool:
        """Whether the last load failed and its back-off lasts; after the back-off one more load may be tried."""
        if self.failure is not None and now >= self.retry_at:
            self.failure, self.is_quarantined = None, False  # `num_failures` stays: the next back-off is longer
        return self.failure is not None

    def fail(self, failure: EngineFailure, now: float, is_final: bool = False) -> None:
        """Note a failed load or copy; `is_final` says that trying again cannot help."""
        self.failure = failure
        self.num_failures += 1
        is_outage = failure.code == OUTAGE
        is_hopeless = self.num_failures >= MAX_FAILURES and not is_final and not is_outage
        self.is_quarantined = failure.code == CORRUPT or is_hopeless
        max_wait = MAX_OUTAGE_RETRY_S if is_outage else MAX_RETRY_S
        wait = min(FIRST_RETRY_S * 2 ** (self.num_failures - 1), max_wait)
        wait = QUARANTINE_S if self.is_quarantined else wait
        self.retry_at = inf if is_final or failure.code == CORRUPT else now + wait

    def clear_failures(self) -> None:
        """Forget all failures: a load succeeded, or the artifact was uploaded again or deleted."""
        self.failure, self.num_failures, self.is_quarantined = None, 0, False
