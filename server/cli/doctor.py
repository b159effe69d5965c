"""`manyhats doctor`: show what this machine would serve with, and name what is wrong on it.

It loads neither torch nor a base, so that it is quick and says something even if those are broken. Each section is
found by itself: one that cannot be told is a fault of its own, and the others are still shown.
"""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from server.settings import Settings

PACKAGE = "manyhats"
SHOWN = (PACKAGE, "torch", "transformers", "numba", "llvmlite", "safetensors", "fastapi")
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f")
NVIDIA = Path("/dev/nvidiactl")
CGROUP = Path("/sys/fs/cgroup")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
LIBRARIES_BYTES = 2**30  # that the two processes take before a base is loaded
LOADING_BYTES = 6  # of a parameter while a base loads: it is read in 4, and packed in 2 beside that
Section = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A fault of this machine and what to do about it, a sentence each without a full stop."""

    what: str
    do: str


@dataclass
class Report:
    """The sections, of names and values each, and the faults of one examination."""

    sections: dict[str, Section] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, what: str, do: str) -> None:
        """Add a fault to the report."""
        self.faults.append(Fault(what, do))


def doctor(
    base: Annotated[str | None, typer.Option(help="the base to look at (else as `manyhats serve` chooses)")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what this machine would serve with, and what is wrong on it; the exit code is then 1."""
    report = examine(base)
    if json_:
        found = {**report.sections, "faults": [asdict(fault) for fault in report.faults]}
        print(json.dumps(found, default=str))  # noqa: T201 - the answer
    else:
        _show(report, Console(highlight=False))
    raise typer.Exit(1 if report.faults else 0)


def examine(base: str | None = None) -> Report:
    """Find out everything that `manyhats doctor` shows. Raises nothing: what cannot be told is a fault."""
    report = Report()
    settings = _guarded(report, "settings", lambda: _settings(report, base))
    sections: dict[str, Callable[[], Section]] = {
        "versions": lambda: _versions(report),
        "cpu": _cpu,
        "kernels": lambda: _kernels(report, settings),
        "caches": lambda: _caches(settings),
        "base": lambda: _base(report, settings),
        "memory": lambda: _memory(report, settings),
        "runs_as": lambda: _runs_as(settings),
    }
    for name, find in sections.items():
        report.sections[name] = _guarded(report, name, find) or {}
    return report


def _guarded(report: Report, name: str, find: Callable[[], Any]) -> Any:
    """Return what `find` finds; None, with a fault added, if it raises."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - whatever is broken here, the rest is told
        why = f"{type(error).__name__}: {error}"
        report.fault(f"{name} cannot be told: {why}", "mend that first; `pip install --force-reinstall manyhats` may")
        return None


def _settings(report: Report, base: str | None) -> Settings | None:
    """The settings that `manyhats serve` would have without flags; None if they cannot be meant."""
    from pydantic import ValidationError

    from server.settings import Settings, SettingsError, check_environment

    for name in os.environ:
        try:
            check_environment({name: ""})
        except SettingsError as error:
            report.fault(str(error), f"unset {name}, or give it the name that is meant")
    try:
        return Settings() if base is None else Settings(base=base)
    except ValidationError as error:
        for each in error.errors():
            name = ".".join(map(str, each["loc"])) or "settings"
            report.fault(f"{name}: {each['msg']}", "set its MANYHATS_ variable to a value that `serve --help` allows")
    return None


def _versions(report: Report) -> Section:
    """Versions, and faults of packages that are missing, of another version than ours needs, or of another build."""
    found: Section = {"python": platform.python_version()}
    for name in SHOWN:
        found[name] = _version(name)
    for name, pin in _requirements():
        here = found[name] if name in found else _version(name)
        if here is None:
            report.fault(f"{name} is not installed", f"pip install '{name}{f'=={pin}' if pin else ''}'")
        elif pin is not None and here.partition("+")[0] != pin:
            report.fault(f"{name} is {here}, and {PACKAGE} needs {pin}", f"pip install '{name}=={pin}'")
    found["torch_cuda"] = _torch_cuda()
    if found["torch_cuda"] is not None and not NVIDIA.exists():
        do = "it works, and takes gigabytes; install torch from an index of CPU builds (docs/deployment.md)"
        report.fault(f"torch is a build for CUDA {found['torch_cuda']}, and there is no NVIDIA GPU here", do)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Packages that serving needs, each with its version where only one will do."""
    for line in metadata.requires(PACKAGE) or []:
        if "extra ==" not in line and (match := re.match(r"([\w.-]+)(?:\[[\w,]*\])?(?:==([\w.]+))?", line)):
            yield match[1], match[2]


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, read from its files; None for a CPU build, or without torch."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(r"^cuda[^=\n]*= *'([^']+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def _cpu() -> Section:
    import llvmlite.binding

    from server.model.host_cpu import features
    from server.settings import Settings

    known = features()
    return {
        "name": llvmlite.binding.get_host_cpu_name(),
        "features": [name for name in CPU_FEATURES if known.get(name)],
        "missing": [name for name in CPU_FEATURES if not known.get(name)],
        "cores": Settings.model_fields["num_threads"].get_default(call_default_factory=True),
    }


def _kernels(report: Report, settings: Settings | None) -> Section:
    """Tell whether the kernels of the chosen precision are compiled, and in which folder."""
    from server.model.backends.kernel_cache import find_cache

    cache = find_cache(None if settings is None else settings.cache)
    precision = "auto" if settings is None else settings.precision
    if cache.refused is not None:
        instead = "compiled again at each start" if cache.folder is None else f"kept in {cache.folder} meanwhile"
        what = f"compiled kernels cannot be kept in {cache.refused}, which cannot be written: they are {instead}"
        report.fault(what, "make that folder writable, or name one that is with --cache")
    return {"folder": cache.folder, "precision": precision, "are_compiled": cache.is_complete(precision)}


def _caches(settings: Settings | None) -> Section:
    from adapters_store.base.cache import default_cache

    cache = default_cache() if settings is None else settings.cache
    return {part: {"folder": cache / part, "bytes": _num_bytes(cache / part)} for part in ("bases", "kernels")}


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _base(report: Report, settings: Settings | None) -> Section:
    """The base: whether it is here, where, and its size. Nothing is fetched."""
    from adapters_store.base.resolve import SMOLLM2

    if settings is None:
        return {}
    name, folder = settings.base, _base_folder(settings)
    if folder is None and name != SMOLLM2 and (Path(name).is_absolute() or name.count("/") != 1):
        report.fault(f"the base {name} is not here", f"name a Hugging Face folder, a hub id, or {SMOLLM2}")
    found: Section = {"name": name, "is_found": folder is not None, "folder": folder}
    if folder is None:
        return found | {"at_first_start": "it is fetched and converted" if name == SMOLLM2 else "it is fetched"}
    num_parameters = sum(map(_num_parameters, folder.glob("*.safetensors")))
    if not num_parameters:
        report.fault(f"{folder} has no weights", "delete the folder, or fetch the base again")
    return found | {"bytes": _num_bytes(folder), "num_parameters": num_parameters}


def _base_folder(settings: Settings) -> Path | None:
    from adapters_store.base.resolve import SMOLLM2, SMOLLM2_FOLDER

    ours = settings.cache / "bases" / SMOLLM2_FOLDER
    folder = ours if settings.base == SMOLLM2 else Path(settings.base).expanduser()
    if (folder / "config.json").is_file():
        return folder
    return _hub_folder(settings) if settings.base.count("/") == 1 else None


def _hub_folder(settings: Settings) -> Path | None:
    """The folder of a base that was fetched from the hub earlier."""
    from huggingface_hub import try_to_load_from_cache

    from adapters_store.base.resolve import hub_cache

    found = try_to_load_from_cache(settings.base, "config.json", cache_dir=hub_cache(settings.cache))
    return Path(found).parent if isinstance(found, str) else None


def _num_parameters(path: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    spans = [(entry["dtype"], *entry["data_offsets"]) for key, entry in header.items() if key != "__metadata__"]
    return sum((last - first) // ITEM_BYTES.get(dtype, 4) for dtype, first, last in spans)


def _memory(report: Report, settings: Settings | None) -> Section:
    """Memory that is free for this process and what a start needs at least, in bytes."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (_cgroup_bytes(f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + _reclaimable_bytes()))
    if settings is None:
        return {"free_bytes": free}
    num_parameters = report.sections.get("base", {}).get("num_parameters", 0)
    needed = LIBRARIES_BYTES + LOADING_BYTES * num_parameters + int(settings.kv_cache_bytes)
    if free < needed:
        what = f"{_size(free)} of memory are free, and a start needs {_size(needed)}"
        report.fault(what, "free memory, serve a smaller base, or lower MANYHATS_KV_CACHE_BYTES")
    return {"free_bytes": free, "needed_bytes": needed}


def _reclaimable_bytes() -> int:
    """Count the file cache that this container's memory controller gives back when memory is asked for."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _cgroup_bytes(name: str) -> int | None:
    """A number of this container's memory controller; None if there is none or no limit."""
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _runs_as(settings: Settings | None) -> Section:
    """The backend and the precision that `manyhats serve` would choose here."""
    from server.model.host_cpu import has_halves

    if settings is None:
        return {}
    on_cpu, precision = settings.device == "cpu", settings.precision
    if precision == "auto":
        precision = ("fp16" if has_halves() else "fp32") if on_cpu else "bf16"  # as `choose_precision` does
    backend = "cpu" if on_cpu else "torch"
    return {"backend": backend, "device": settings.device, "precision": precision, "num_threads": settings.num_threads}


def _show(report: Report, console: Console) -> None:
    """A line for each value, then the faults."""
    for section, values in report.sections.items():
        console.print(section.replace("_", " "), style="bold", markup=False)
        for name, value in values.items():
            console.print(f"  {name.replace('_', ' '):<14} {_text(name, value)}", markup=False, soft_wrap=True)
    for fault in report.faults:
        console.print(f"wrong: {fault.what}", style="red", markup=False, soft_wrap=True)
        console.print(f"   do: {fault.do}", markup=False, soft_wrap=True)
    if not report.faults:
        console.print("nothing is wrong", style="green")


def _text(name: str, value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return _size(value)
        case list():
            return ", ".join(value) or "none"
        case dict():
            return ", ".join(_text(key, each) for key, each in value.items())
    return str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


if __name__ == "__main__":  # also where the other commands' libraries are broken
    sys.argv[0] = "manyhats doctor"
    typer.run(doctor)
