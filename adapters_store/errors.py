"""Errors with the code that the API answers, for artifacts, names, quotas and stores.

ArtifactError (artifact_invalid)
├── ArtifactTooLargeError (artifact_too_large)
├── ArtifactTypeError (artifact_type)
├── MethodUnsupportedError (method_unsupported)
├── WrongBaseError (wrong_base)
├── ProbeError (probe_failed)
├── ParityError (parity_failed)
└── ArtifactCorruptError (artifact_corrupt)
AbsentError (not_found)
NameTakenError (conflict)
NoEarlierRouteError (conflict)
NotAllowedError
StoreError
StoreDownError (store_unavailable)
└── StoreRefusedError
RegistryDownError
└── RegistryHeldError
QuotaError (limit_reached)
"""

from __future__ import annotations

import errno


class ArtifactError(Exception):
    """An artifact is refused. `param` names the cause: a tensor, a config key, or a member of the zip."""

    code = "artifact_invalid"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ArtifactTooLargeError(ArtifactError):
    """The artifact has more bytes, tensors or zip members than the limits allow."""

    code = "artifact_too_large"


class ArtifactTypeError(ArtifactError):
    """The upload is neither a zip of a PEFT folder nor a safetensors file."""

    code = "artifact_type"


class MethodUnsupportedError(ArtifactError):
    """The artifact's method, or an option of it that changes the output, is not served."""

    code = "method_unsupported"


class WrongBaseError(ArtifactError):
    """The artifact was made for another base."""

    code = "wrong_base"


class ProbeError(ArtifactError):
    """The engine failed to compute a probe request with the adapter."""

    code = "probe_failed"


class ParityError(ArtifactError):
    """The engine's output with the adapter differs from the output that its trainer recorded."""

    code = "parity_failed"


class ArtifactCorruptError(ArtifactError):
    """The stored bytes are not the bytes that were put there: their digest differs."""

    code = "artifact_corrupt"


class AbsentError(Exception):
    """The tenant does not exist, or has no such task, version or key."""

    code = "not_found"


class NameTakenError(Exception):
    """The tenant's name is in use, or was used before: names are never reused."""

    code = "conflict"


class NoEarlierRouteError(Exception):
    """The task has no earlier route to roll back to."""

    code = "conflict"


class QuotaError(Exception):
    """The tenant's limit on adapters or on their bytes is reached; waiting does not help."""

    code = "limit_reached"


class NotAllowedError(Exception):
    """A path or URL is not below a place that the operator allows, or cannot be read there."""


class StoreError(Exception):
    """The artifact store or the registry cannot be used as configured; the message is for the operator."""


class StoreDownError(OSError):
    """The artifact store does not answer at the moment; retrying can help."""

    code = "store_unavailable"

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return self.strerror or ""


class StoreRefusedError(StoreDownError):
    """The artifact store answers, and refuses access or lacks the place that is configured: the operator must act."""


class RegistryDownError(Exception):
    """The registry's database does not answer at the moment; retrying can help."""


class RegistryHeldError(RegistryDownError):
    """The registry's database answers, and another program or server holds it: nothing can be written now."""
