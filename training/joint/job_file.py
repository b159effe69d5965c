"""Files of jobs (jobs.yaml): a list of jobs by the names of `manyhats train`'s flags, and `defaults` for all of them.

defaults: {base: smollm2-135m, epochs: 3}
jobs:
  - {data: intents.jsonl, out: runs/intents, lr: 0.003}
  - {data: mood.csv, out: runs/mood, method: bottleneck, seed: 1}
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from training.errors import OptionError
from training.other_names import FIXED, FLAGS

TOP = ("defaults", "jobs")


class UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice in a mapping, of which YAML's takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping. Raises `yaml.YAMLError`."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_jobs(
    path: Path, command: Callable[..., None], without: tuple[str, ...], needed: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Read each job's values of `command`'s parameters, by name; a parameter in `without` may not be given.

    Raises `OptionError`, naming the job and the key, if the file is no such list, or a `needed` parameter is missing.
    """
    defaults, jobs = _parts(path)
    keys, read = _keys(command, without), list[dict[str, Any]]()
    for number, job in enumerate(jobs, start=1):
        read.append(_job(f"{path} job {number}", {**defaults, **job}, keys))
        if missing := [name for name in needed if read[-1][name] is None]:
            raise OptionError(f"{path} job {number} has no {missing[0]}.")
    return read


def _parts(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = yaml.load(path.read_text("utf-8"), UniqueKeys)  # noqa: S506 - a safe loader
    except OSError as error:
        raise OptionError(f"--jobs {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--jobs {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), list) or not content["jobs"]:
        raise OptionError(f"--jobs {path} must hold `jobs:`, a list of one job or more.")
    if strange := [key for key in content if key not in TOP]:
        raise OptionError(f"--jobs {path} has {strange[0]!r} beside {' and '.join(TOP)}: what is shared goes there.")
    defaults = _by_parameter(f"{path} defaults", content.get("defaults") or {})
    return defaults, [_by_parameter(f"{path} job {n}", job) for n, job in enumerate(content["jobs"], start=1)]


def _by_parameter(where: str, job: Any) -> dict[str, Any]:
    """Return a job by parameters' names: `batch-size` becomes `batch_size`."""
    if not isinstance(job, dict) or not all(isinstance(key, str) for key in job):
        raise OptionError(f"{where} must be keys with values, like `data: rows.jsonl`, not {str(job)[:40]!r}.")
    for key in job:
        if (name := key.replace("-", "_")) != key and name in job:
            raise OptionError(f"{where} has {key!r} and {name!r}, which are one: which counts?")
    return {key.replace("-", "_"): value for key, value in job.items()}


def _keys(command: Callable[..., None], without: tuple[str, ...]) -> type[BaseModel]:
    """Return a model that checks values of the command's parameters."""
    types = get_type_hints(command)
    fields: dict[str, Any] = {
        name: (types[name], parameter.default)
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in without
    }
    return create_model("Job", __config__=ConfigDict(extra="forbid", coerce_numbers_to_str=True), **fields)


def _job(where: str, given: dict[str, Any], keys: type[BaseModel]) -> dict[str, Any]:
    try:
        return keys(**given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] != "extra_forbidden":
            raise OptionError(f"{where}: {key} cannot be {first['input']!r}: {first['msg']}.") from error
        near = [FLAGS[key]] if key in FLAGS else difflib.get_close_matches(key, keys.model_fields, n=1)
        hint = f"; {near[0]} is one" if near else f", which are {', '.join(keys.model_fields)}"
        hint = f": {FIXED[key]}" if key in FIXED else hint
        raise OptionError(f"{where}: {key} is no flag of `manyhats train`{hint}.") from error
