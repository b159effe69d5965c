"""An engine process over fakes. The base's name in its config says what it does.

`slow`, `raises` (at a request), `computes` (for seconds in each step), `refuses`, `crashes`, `hangs`, `loads` (for
ever) or `garbles` (its first frame). Whatever its name, it dies of a step that has the token `POISON`.
"""

import os
import sys
import time
from typing import Any

from server.core import Row, Sampled
from server.engine.engine import Engine
from server.engine.fake import fake_ready
from server.engine.messages import EngineConfig, Ready
from server.engine.worker import OnLoaded, main
from server.model.fake import FakePacked, FakeRunner, FakeSlots
from tests.server.engine.spawners import ThreadSpawner

POISON = 9999  # beyond the vocabulary: no fake answers with it


class MortalRunner(FakeRunner):
    """A fake that ends its process if it computes `POISON`, and that may compute for a long time."""

    busy_numbers = 0

    def run(self, rows: list[Row]) -> list[Sampled | None]:
        """Run a step, see `Runner.run`."""
        if any(POISON in row.tokens for row in rows):
            os.abort()
        sum(range(self.busy_numbers))  # in C: as in a kernel, no other thread runs meanwhile
        return super().run(rows)


def load(digest: str) -> FakePacked:
    """A fake patch, after a little while."""
    time.sleep(0.05)
    if digest.startswith("bad"):
        raise ValueError("a bad one")
    return FakePacked(digest, 10)


def load_base(config: EngineConfig) -> None:
    """Load nothing, or do what the name says."""
    if config.runner.name == "refuses":
        raise ValueError("this base has no attention")
    if config.runner.name == "crashes":
        os._exit(3)
    if config.runner.name == "loads":
        time.sleep(60)


def build(config: EngineConfig, _loaded: None, on_loaded: OnLoaded) -> tuple[Ready, Engine[FakePacked]]:
    """An engine over fakes, or what the name says."""
    if config.runner.name == "garbles":
        connection: Any = on_loaded.__self__  # type: ignore[attr-defined] # of a bound method
        connection._socket.sendall(b"\0\0\0\1\xc1")
        time.sleep(60)
    adapter_slots = FakeSlots(config.slot_bytes)
    seconds = {"slow": 0.02, "hangs": 60.0}.get(config.runner.name, 0.0)
    runner = MortalRunner(adapter_slots, step_seconds=seconds)
    runner.busy_numbers = 2 * 10**8 * (config.runner.name == "computes")
    engine = Engine(
        runner,
        adapter_slots,
        load,
        config,
        eos_token_ids=[0],
        spawner=ThreadSpawner(config.num_loaders),
        clock=time.monotonic,
        on_loaded=on_loaded,
    )
    if config.runner.name == "raises":
        engine.submit = {}.pop  # type: ignore[method-assign, assignment] # a KeyError
    return fake_ready(name=config.runner.name), engine


if __name__ == "__main__":
    sys.exit(main(load=load_base, build=build))
