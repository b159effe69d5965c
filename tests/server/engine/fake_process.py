"""An engine process over fakes. The base's name in its config says what it does.

`slow`, `refuses`, `crashes`, `hangs`, `loads` (for ever) or `garbles` (its first frame).
"""

import os
import sys
import time

from server.engine.engine import Engine
from server.engine.fake import fake_ready
from server.engine.messages import EngineConfig, Ready
from server.engine.worker import OnLoaded, main
from server.model.fake import FakePacked, FakeRunner, FakeSlots
from tests.server.engine.spawners import ThreadSpawner


def load(digest: str) -> FakePacked:
    """A fake patch, after a little while."""
    time.sleep(0.05)
    if digest.startswith("bad"):
        raise ValueError("a bad one")
    return FakePacked(digest, 10)


def build(config: EngineConfig, on_loaded: OnLoaded) -> tuple[Ready, Engine[FakePacked]]:
    """An engine over fakes, or what the name says."""
    if config.runner.name == "refuses":
        raise ValueError("this base has no attention")
    if config.runner.name == "crashes":
        os._exit(3)
    if config.runner.name == "garbles":
        os.write(int(sys.argv[-1]), b"\0\0\0\1\xc1")
    if config.runner.name in ("garbles", "loads"):
        time.sleep(60)
    adapter_slots = FakeSlots(config.slot_bytes)
    seconds = {"slow": 0.02, "hangs": 60.0}.get(config.runner.name, 0.0)
    runner = FakeRunner(adapter_slots, step_seconds=seconds)
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
    return fake_ready(name=config.runner.name), engine


if __name__ == "__main__":
    sys.exit(main(build=build))
