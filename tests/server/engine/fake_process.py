"""An engine process over fakes. `name` of the config says what it does.

`slow`, `refuses`, `crashes`, `hangs`, `loads` (for ever) or `garbles` (its first frame).
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from server.engine.engine import Engine
from server.engine.fake import fake_ready
from server.engine.messages import EngineConfig, Ready
from server.engine.worker import OnLoaded, main
from server.model.fake import FakePacked, FakeRunner, FakeSlots


def load(digest: str) -> FakePacked:
    """A fake patch, after a little while."""
    time.sleep(0.05)
    if digest.startswith("bad"):
        raise ValueError("a bad one")
    return FakePacked(digest, 10)


def build(config: EngineConfig, on_loaded: OnLoaded) -> tuple[Ready, Engine[FakePacked]]:
    """An engine over fakes, or what the name says."""
    if config.name == "refuses":
        raise ValueError("this base has no attention")
    if config.name == "crashes":
        os._exit(3)
    if config.name == "garbles":
        os.write(int(sys.argv[-1]), b"\0\0\0\1\xc1")
    if config.name in ("garbles", "loads"):
        time.sleep(60)
    adapter_slots = FakeSlots(config.slot_bytes)
    seconds = {"slow": 0.02, "hangs": 60.0}.get(config.name, 0.0)
    runner = FakeRunner(adapter_slots, step_seconds=seconds)
    executor = ThreadPoolExecutor(config.num_loaders)
    engine = Engine(
        runner,
        adapter_slots,
        load,
        config,
        eos_token_ids=[0],
        executor=executor,
        clock=time.monotonic,
        on_loaded=on_loaded,
    )
    return fake_ready(name=config.name), engine


if __name__ == "__main__":
    sys.exit(main(build=build))
