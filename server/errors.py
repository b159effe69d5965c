"""Errors that a user can see, all of them.

ServerError
├── BadRequestError 400
│   ├── ContextLengthError 400
│   └── UnsupportedSchemaError 400
├── UnauthorizedError 401
├── ForbiddenError 403
├── NotFoundError 404
│   └── VersionGoneError 404
├── MethodNotAllowedError 405
├── ConflictError 409
├── TooLargeError 413
├── UriTooLongError 414
├── UnsupportedTypeError 415
├── InvalidFieldError 422
├── ArtifactRefusedError 413 415 422 503, by its code
├── TenantLimitError 429
├── HeadersTooLargeError 431
├── InternalError 500
├── EngineFailedError 400 422 500 503 504, by the engine's code
├── UnavailableError 503
│   ├── DrainingError 503
│   ├── ProbeLateError 503
│   ├── TooManyConnectionsError 503
│   ├── RegistryUnavailableError 503
│   └── StoreUnavailableError 503
└── StorageError 507

On the wire: {"error": {"type", "code", "message", "param", "request_id"}}; to clients of LoRAX and TGI
{"error": message, "error_type", "type", "code", "param", "request_id"}.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adapters_store.errors import AbsentError, ArtifactError, StoreDownError
from server.core import EngineFailure

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
TEXT_GENERATION_TYPES = {
    **dict.fromkeys((400, 413, 415, 422), "validation"),
    **dict.fromkeys((429, 503), "overloaded"),
    **dict.fromkeys((500, 504), "generation"),
}
ARTIFACT_STATUS = {"artifact_too_large": 413, "artifact_type": 415, "artifact_corrupt": 503}
STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
ENGINE_STATUS = {
    "adapter_too_large": 422,
    "unsupported_schema": 400,
    "deadline_exceeded": 504,
    "overloaded": 503,
    "engine_restarting": 503,
    "adapter_failed": 503,
    "artifact_corrupt": 503,
    StoreDownError.code: 503,
}


class ServerError(Exception):
    """`param` names the offending field or thing; `retry_after` is whole seconds."""

    status = 500
    code = "internal"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param, self.retry_after = param, retry_after

    def wire(self, request_id: str) -> dict[str, Any]:
        """The error object of the HTTP contract."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        body = {"type": kind, "code": self.code, "message": str(self), "param": self.param, "request_id": request_id}
        return {"error": body}

    def text_generation_wire(self, request_id: str) -> dict[str, Any]:
        """The error in the form of LoRAX and TGI, whose clients read a sentence, and a word if they know one for it."""
        word = TEXT_GENERATION_TYPES.get(self.status)
        body = {"error": str(self), **({} if word is None else {"error_type": word})}
        return body | {name: value for name, value in self.wire(request_id)["error"].items() if name != "message"}

    def as_openai(self) -> None:
        """Take the status, the code and the param that clients of OpenAI's act on; its API has no 422."""
        if self.status == 422:
            self.status = 400
        if self.status == 404 and self.param == "task":
            self.code, self.param = "model_not_found", "model"


class BadRequestError(ServerError):
    """Malformed, or over a limit."""

    status, code = 400, "bad_request"


class ContextLengthError(BadRequestError):
    """A prompt and its answer that are longer than any sequence of this server can be."""

    code = "context_length_exceeded"


class UnsupportedSchemaError(BadRequestError):
    """A form of the answer that is too large, too complex, or has a part that is not served."""

    code = "unsupported_schema"


class UnauthorizedError(ServerError):
    """The key is absent or bad."""

    status, code = 401, "unauthorized"


class ForbiddenError(ServerError):
    """The key is good, and not for this."""

    status, code = 403, "forbidden"


class NotFoundError(ServerError):
    """Absent, or another tenant's."""

    status, code = 404, "not_found"


class VersionGoneError(NotFoundError):
    """The version that a request was resolved to was deleted before it began: its route may name another by now."""


class MethodNotAllowedError(ServerError):
    """The route exists, with other methods."""

    status, code = 405, "method_not_allowed"


class ConflictError(ServerError):
    """The request conflicts with the present state, such as a name that is taken."""

    status, code = 409, "conflict"


class TooLargeError(ServerError):
    """A body over its cap."""

    status, code = 413, "too_large"


class UriTooLongError(ServerError):
    """The URL exceeds its bound, complete or not."""

    status, code = 414, "uri_too_long"


class HeadersTooLargeError(ServerError):
    """The headers exceed their bounds, complete or not."""

    status, code = 431, "headers_too_large"


class UnsupportedTypeError(ServerError):
    """A content type that the route does not take."""

    status, code = 415, "unsupported_type"


class InvalidFieldError(ServerError):
    """A field that is unknown, of the wrong type, or out of range."""

    status, code = 422, "invalid_field"


class ArtifactRefusedError(ServerError):
    """The store's refusal of an artifact."""

    def __init__(self, error: ArtifactError) -> None:
        super().__init__(str(error), error.param)
        self.code, self.status = error.code, ARTIFACT_STATUS.get(error.code, 422)


class TenantLimitError(ServerError):
    """A tenant is over one of its limits, which `param` names. If waiting helps, `retry_after` says how long."""

    status, code = 429, "tenant_limit"


class InternalError(ServerError):
    """The server failed: a bug of ours."""


class EngineFailedError(ServerError):
    """The engine ended a sequence without an answer; `retry_after` is told if it may answer later."""

    def __init__(self, failure: EngineFailure, retry_after: int = 1) -> None:
        super().__init__(failure.message)
        self.code, self.status = failure.code, ENGINE_STATUS.get(failure.code, 500)
        self.retry_after = retry_after if self.status == 503 else None


class UnavailableError(ServerError):
    """The engine is not ready, or the server drains."""

    status, code = 503, "engine_unavailable"


class DrainingError(UnavailableError):
    """The server is about to end: what runs may finish, nothing new begins."""

    code = "draining"


class TooManyConnectionsError(UnavailableError):
    """The server has as many busy connections as there may be."""

    code = "overloaded"


class ProbeLateError(UnavailableError):
    """The engine had no time for a probe."""

    code = "overloaded"


class RegistryUnavailableError(UnavailableError):
    """The registry's database does not answer."""

    code = "registry_unavailable"


class StoreUnavailableError(UnavailableError):
    """The store of artifacts does not answer."""

    code = "store_unavailable"


class StorageError(ServerError):
    """The disk is full or fails."""

    status, code = 507, "storage_failed"


@contextmanager
def absent_is_404(param: str) -> Iterator[None]:
    """Raise `NotFoundError` of `param` if the block raises the registry's `AbsentError`."""
    try:
        yield
    except AbsentError as error:
        raise NotFoundError(str(error), param) from None
