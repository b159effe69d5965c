"""To a server, over HTTP as any user: what a task serves, how good that is, and a new version of it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters_store.errors import ArtifactError
from adapters_store.format.archive import ZIP_TYPE, zipped
from adapters_store.format.folder import MANIFEST, read_files, read_folder, read_manifest
from adapters_store.format.manifest import Manifest
from training.errors import PushError

TIMEOUT_S = 300.0  # an upload is proved before it is answered
ABSENT = 404


@dataclass(frozen=True)
class Target:
    """A task of a server. `key` is sent where the server asks for one."""

    url: str
    task: str
    key: str | None = None
    note: str = ""

    def served(self) -> tuple[int, Manifest | None] | None:
        """The version that most requests are routed to, and what its manifest says; None for a task without one."""
        answer = self._ask("GET", f"/tasks/{self.task}", may_be_absent=True)
        route = {} if answer.status_code == ABSENT else answer.json()["route"]["versions"]
        if not route:
            return None
        number = max(route, key=lambda one: (route[one], int(one)))
        body = self._ask("GET", f"/tasks/{self.task}/versions/{number}/artifact")
        with zipfile.ZipFile(io.BytesIO(body.content)) as files:
            has = MANIFEST in files.namelist()
            return int(number), read_manifest(files.read(MANIFEST)) if has else None

    def upload(self, folder: Path, is_activated: bool) -> dict[str, Any]:
        """What the server says of the new version."""
        query = {"task": self.task, "note": self.note, "activate": str(is_activated).lower()}
        headers = {"Content-Type": ZIP_TYPE}
        answer = self._ask("POST", "/adapters", params=query, content=zipped(read_files(folder)), headers=headers)
        said: dict[str, Any] = answer.json()
        return said

    def _ask(self, method: str, path: str, may_be_absent: bool = False, **request: Any) -> httpx.Response:
        """Raises `PushError` with the server's own sentence, or why it was not reached."""
        headers = {**request.pop("headers", {}), **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            answer = httpx.request(
                method, f"{self.url.rstrip('/')}{path}", headers=headers, timeout=TIMEOUT_S, **request
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PushError(f"{self.url} cannot be reached: {error}") from error
        if answer.is_error and not (may_be_absent and answer.status_code == ABSENT):
            raise PushError(f"{self.url} refuses: {said(answer)}")
        return answer


def said(answer: httpx.Response) -> str:
    """The message of an error in the server's form, or that it is in none."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"it answers {answer.status_code}, and not as manyhats does"


def push_folder(target: Target, folder: Path, is_activated: bool = True) -> str:
    """Upload any PEFT folder; a sentence that says what the task serves then. Raises `PushError`."""
    try:
        read_folder(folder)
    except (ArtifactError, OSError) as error:
        raise PushError(f"{folder} is no artifact: {error}") from error
    said = target.upload(folder, is_activated)
    served = target.served()
    routed = "nothing" if served is None else f"version {served[0]}"
    return f"{target.url}: {target.task} has it as version {said['version']}, and serves {routed}."


def push_if_better(target: Target, folder: Path, is_forced: bool) -> str:
    """Upload what a run wrote, and route to it where it is better than what the task serves. Raises `PushError`."""
    is_better, why = (True, "--force") if is_forced else _is_better(target, folder)
    return f"{push_folder(target, folder, is_better)} {'Activated' if is_better else 'Not activated'}: {why}."


def _is_better(target: Target, folder: Path) -> tuple[bool, str]:
    """Beside what the task serves, where that was scored on the same rows; of a new task beside the base."""
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
    return _compare(ours["after"], theirs.evaluation["after"], f"version {number}")


def _split(evaluation: Mapping[str, Any]) -> str:
    """What was scored, as a sentence names it; the manifest may be anyone's."""
    digest, scores = evaluation.get("split_sha256"), evaluation.get("after")
    num_rows = scores.get("num_rows", "unknown") if isinstance(scores, Mapping) else "unknown"
    name = f"{num_rows} rows of {evaluation.get('data', 'a file without a name')}"
    return f"{name} (split {str(digest)[:12]})" if digest else f"{name} (of no known split)"


def _compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> tuple[bool, str]:
    """Exact match where answers are labels, ROUGE-L where texts were written; strictly better."""
    key = "rouge_l" if None not in (ours.get("rouge_l"), theirs.get("rouge_l")) else "exact_match"
    name = key.replace("_", " ").replace("rouge l", "ROUGE-L")
    return ours[key] > theirs[key], f"{name} is {ours[key]:.3f}, that of {what} {theirs[key]:.3f}"
