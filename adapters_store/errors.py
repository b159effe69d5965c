"""Why an artifact or a name is refused.

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
StoreError
RegistryDownError
QuotaError (limit_reached)
"""

from __future__ import annotations


class ArtifactError(Exception):
    """An artifact is refused. `param` names the offending thing: a tensor, a config key, a member of the zip."""

    code = "artifact_invalid"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ArtifactTooLargeError(ArtifactError):
    """More bytes, tensors or members than may be taken in."""

    code = "artifact_too_large"


class ArtifactTypeError(ArtifactError):
    """Not a zip of a PEFT folder and not safetensors."""

    code = "artifact_type"


class MethodUnsupportedError(ArtifactError):
    """A method, or an option that changes the answer, that is not served."""

    code = "method_unsupported"


class WrongBaseError(ArtifactError):
    """The artifact was made for another base."""

    code = "wrong_base"


class ProbeError(ArtifactError):
    """Worn by the engine, it does not compute."""

    code = "probe_failed"


class ParityError(ArtifactError):
    """Worn by the engine, it does not answer as it did for its trainer."""

    code = "parity_failed"


class ArtifactCorruptError(ArtifactError):
    """The bytes in the store are not those that were put there."""

    code = "artifact_corrupt"


class AbsentError(Exception):
    """No such task or version for this tenant, or no such tenant."""

    code = "not_found"


class NameTakenError(Exception):
    """The name is a tenant's, or was."""

    code = "conflict"


class NoEarlierRouteError(Exception):
    """A task never had another route that it could go back to."""

    code = "conflict"


class QuotaError(Exception):
    """A tenant has as many adapters, or bytes of them, as it may; no wait would help."""

    code = "limit_reached"


class StoreError(Exception):
    """The store of artifacts or the registry cannot be used as it was named; the message is for the operator."""


class RegistryDownError(Exception):
    """The registry's database does not answer just now."""
