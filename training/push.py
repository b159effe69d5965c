"""Push an artifact to a server over HTTP: see what a task serves and how good that is, and upload a new version."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from adapters_store.errors import ArtifactError
from adapters_store.escapes import url_path
from adapters_store.format.archive import ZIP_TYPE, zipped
from adapters_store.format.folder import MANIFEST, read_files, read_folder, read_manifest
from adapters_store.format.manifest import Manifest
from adapters_store.format.zip_file import UNSOUND
from training.errors import PushError
from training.http_client import NOT_OURS, STRANGE, RequestError, ask

TIMEOUT_S = 300.0  # an upload is validated before it is answered
PROBES_WITHIN_S = 240.0  # on a busy server
ABSENT = 404


@dataclass(frozen=True)
class Target:
    """A task of a server; `key` is the API key, and `note` a note on the versions that are pushed."""

    url: str
    task: str
    key: str | None = None
    note: str = ""

    def served(self) -> tuple[int, Manifest | None] | None:
        """Return the version that most requests are routed to and its manifest, if it has one.

        Returns None if the task serves no version. Raises `PushError`.
        """
        response = self._ask("GET", ("tasks", self.task), allowed=(ABSENT,))
        with self._reading():
            route = {} if response.status_code == ABSENT else response.json()["route"]["versions"]
            if not route:
                return None
            number = max(route, key=lambda version: (route[version], int(version)))
        body = self._ask("GET", ("tasks", self.task, "versions", number, "artifact"))
        with self._reading(), zipfile.ZipFile(io.BytesIO(body.content)) as files:
            has_manifest = MANIFEST in files.namelist()
            return int(number), read_manifest(files.read(MANIFEST)) if has_manifest else None

    def upload(self, folder: Path, is_activated: bool) -> dict[str, Any]:
        """Upload an artifact as a new version, and return the server's answer. Raises `PushError`."""
        query = {
            "task": self.task,
            "note": self.note,
            "activate": str(is_activated).lower(),
            "timeout_s": PROBES_WITHIN_S,
        }
        body, headers = zipped(read_files(folder)), {"Content-Type": ZIP_TYPE}
        response = self._ask("POST", ("adapters",), params=query, content=body, headers=headers)
        with self._reading():
            answer: dict[str, Any] = response.json()
            return {**answer, "version": int(answer["version"])}

    def _ask(self, method: str, path: tuple[str, ...], **request: Any) -> httpx2.Response:
        """Send a request with the key, and return the response. Raises `PushError` with the reason."""
        headers = {**request.pop("headers", {}), **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            url = f"{self.url.rstrip('/')}{url_path(*path)}"
            return ask(httpx2.request, method, url, headers=headers, timeout=TIMEOUT_S, **request)
        except RequestError as error:
            raise PushError(f"{self.url} {error}") from error
        except ValueError as error:  # of the path
            raise PushError(str(error)) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what fails while a response is read into a `PushError`: it is of another server, or was cut."""
        try:
            yield
        except (*NOT_OURS, *UNSOUND, ArtifactError) as error:
            raise PushError(f"{self.url} answers {STRANGE}") from error


class Pushed(NamedTuple):
    """The server's answer to an upload, and a sentence about what the task serves then."""

    answer: dict[str, Any]
    sentence: str


def push_folder(target: Target, folder: Path, is_activated: bool = True) -> Pushed:
    """Upload any PEFT folder. Raises `PushError`."""
    try:
        read_folder(folder)
    except (ArtifactError, OSError) as error:
        raise PushError(f"{folder} is no artifact: {error}") from error
    answer = target.upload(folder, is_activated)
    served = target.served()
    routed = "nothing" if served is None else f"version {served[0]}"
    sentence = f"{target.url}: {target.task} has it as version {answer['version']}, and serves {routed}."
    return Pushed(answer, sentence)


def push_if_better(target: Target, folder: Path, is_forced: bool) -> str:
    """Upload a run's artifact, and route to it if it is better than what the task serves.

    Returns a sentence with the comparison. Raises `PushError`.
    """
    is_better, why = (True, "--force") if is_forced else _is_better(target, folder)
    pushed = push_folder(target, folder, is_better).sentence
    return f"{pushed} {'Activated' if is_better else 'Not activated'}: {why}."


def _is_better(target: Target, folder: Path) -> tuple[bool, str]:
    """Compare with what the task serves, if that was scored on the same rows, or for a new task with the base.

    Returns whether it is better, and why as a clause.
    """
    manifest = read_folder(folder).manifest
    if manifest is None:
        return False, "it has no scores; activate it with --force"
    ours, served = manifest.evaluation, target.served()
    if served is None:
        return _compare(ours["after"], ours["before"], "the base")
    number, theirs = served
    if theirs is None or not theirs.evaluation:
        return False, f"version {number}, which is served, has no scores; activate this one with --force"
    if theirs.evaluation.get("split_sha256") != ours["split_sha256"]:
        scored = f"version {number}, which is served, was scored on {_split(theirs.evaluation)}"
        return False, f"{scored}, and this one on {_split(ours)}; activate it with --force"
    try:
        return _compare(ours["after"], theirs.evaluation["after"], f"version {number}")
    except NOT_OURS:
        return False, f"version {number}, which is served, has scores of another form; activate this one with --force"


def _split(evaluation: Mapping[str, Any]) -> str:
    """Name the rows that were scored; the manifest may be of another program, and lack any entry."""
    digest, scores = evaluation.get("split_sha256"), evaluation.get("after")
    num_rows = scores.get("num_rows", "unknown") if isinstance(scores, Mapping) else "unknown"
    name = f"{num_rows} rows of {evaluation.get('data', 'a file without a name')}"
    return f"{name} (split {str(digest)[:12]})" if digest else f"{name} (of no known split)"


def _compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> tuple[bool, str]:
    """Compare ROUGE-L if both have it, else exact match; better is strictly better."""
    key = "rouge_l" if None not in (ours.get("rouge_l"), theirs.get("rouge_l")) else "exact_match"
    name = key.replace("_", " ").replace("rouge l", "ROUGE-L")
    return ours[key] > theirs[key], f"{name} is {ours[key]:.3f}, that of {what} {theirs[key]:.3f}"
