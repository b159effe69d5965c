"""The first step of a first start: compile the CPU kernels on all cores, and show how far that is."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from adapters_store.cores import num_cores
from server.model.backends.kernel_cache import KernelCache, find_cache

log = logging.getLogger(__name__)
COMPILER = (sys.executable, "-m", "server.model.backends.compile_cpu")
# Each part, and the parts that it is made of. Begun in this order: what takes long or is waited for is first.
PARTS: dict[str, tuple[str, ...]] = {
    "adapters": (),
    "attention": (),
    "products": (),
    "norms": (),
    "layer parts": ("adapters", "products", "norms"),
    "decoder": ("layer parts", "attention"),
    "loops": (),
    "adapter rows": (),
}
MAX_PROCESSES = sum(not needed for needed in PARTS.values())  # more never have a part at once
OnChange = Callable[[list[str], int], None]  # the parts that are being compiled, and how many are done


class CompilerError(Exception):
    """A compiling process ended before its part was done; the sentence names the part."""


@dataclass
class Compilation:
    """Compiles `PARTS` in processes of their own: each is told a part by a line and says when it is done."""

    precision: str
    num_processes: int
    done: set[str] = field(default_factory=set)
    running: dict[subprocess.Popen[str], str] = field(default_factory=dict)

    def run(self, on_change: OnChange) -> None:
        """Compile all parts. Raises `CompilerError` or `OSError`; what is compiled by then is kept."""
        with ExitStack() as stack, DefaultSelector() as selector:
            for _ in range(min(self.num_processes, MAX_PROCESSES)):
                process = stack.enter_context(_compiler(self.precision))
                selector.register(process.stdout, EVENT_READ, process)  # type: ignore[arg-type]
            idle = [key.data for key in selector.get_map().values()]
            while len(self.done) < len(PARTS):
                for name in self._startable()[: len(idle)]:
                    self._begin(idle.pop(), name)
                on_change(list(self.running.values()), len(self.done))
                for key, _ in selector.select():
                    self._end(key.data)
                    idle.append(key.data)
            on_change([], len(self.done))

    def _startable(self) -> list[str]:
        begun = self.done.union(self.running.values())
        return [name for name, needed in PARTS.items() if name not in begun and self.done.issuperset(needed)]

    def _begin(self, process: subprocess.Popen[str], name: str) -> None:
        assert process.stdin is not None  # noqa: S101 - it is a pipe
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        self.running[process] = name

    def _end(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        name = self.running.pop(process, "its imports")
        if process.stdout.readline().strip() != name:
            code = process.poll()
            process.kill()  # it may have said something else, and live on
            raise CompilerError(f"the process that compiled {name} ended with code {code or process.wait()}")
        self.done.add(name)


@contextmanager
def _compiler(precision: str) -> Iterator[subprocess.Popen[str]]:
    """A compiling process. It ends with its input, so also if we are killed."""
    command = [*COMPILER, precision]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own module, no shell
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def compile_kernels(precision: str, console: Console, cache: KernelCache | None = None) -> None:
    """Compile what this precision needs, unless it is on disk already; say what is done and name its folder.

    Without a folder that can be written, or if a compiling process fails, this is said and the start goes on: the
    engine then compiles what it needs as it loads.
    """
    cache = cache or find_cache()
    if cache.refused is not None:
        console.print(_warn(cache), style="yellow", markup=False, highlight=False, soft_wrap=True)
    if cache.folder is None or cache.is_complete(precision):
        return
    compilation = Compilation(precision, num_cores())
    try:
        with _shown(console) as on_change:
            compilation.run(on_change)
    except (CompilerError, OSError) as error:
        log.warning(
            "kernels were not compiled ahead; the engine compiles them as it loads", extra={"reason": str(error)}
        )
        return
    cache.mark_complete(precision)
    done = f"compiled kernels are kept in {cache.folder}: the next start does not compile"
    console.print(done, markup=False, highlight=False, soft_wrap=True)


def _warn(cache: KernelCache) -> str:
    instead = "each start compiles them again, which takes a minute or two"
    if cache.folder is not None:
        instead = f"they are kept in {cache.folder} instead, which may not outlast a reboot"
    return f"warning: compiled kernels cannot be kept in {cache.refused}, which cannot be written: {instead}"


@contextmanager
def _shown(console: Console) -> Iterator[OnChange]:
    """A bar on a terminal, else a line for each part that is done."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    columns = TextColumn("compiling kernels, once"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(PARTS))
        yield lambda running, num_done: progress.update(task, completed=num_done, description=", ".join(running))


@dataclass
class _Lines:
    console: Console
    num_done: int = -1

    def show(self, running: list[str], num_done: int) -> None:
        if num_done != self.num_done and running:
            self.num_done, left = num_done, len(PARTS) - num_done
            line = f"compiling kernels, once: {left} of {len(PARTS)} parts left, now {', '.join(running)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":  # for an image that is built with its kernels, and for tests
    precisions = sys.argv[1:] or ["auto"]
    for each in precisions:
        compile_kernels(each, Console(stderr=True))
    found = find_cache()
    sys.exit(0 if found.folder is None or all(map(found.is_complete, precisions)) else 1)
