"""The wording of adapters that cannot be loaded: for the users of an adapter, without paths of this machine."""

from __future__ import annotations

import logging

from adapters_store.errors import StoreDownError

log = logging.getLogger(__name__)


class LoadError(Exception):
    """A load failed in another process; the message is for users. `code` is that of the store's error there."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def failure_message(digest: str, error: Exception | None) -> str:
    """Tell an adapter's users in a sentence why it could not be loaded."""
    is_outage = getattr(error, "code", None) == StoreDownError.code
    hint = "ask again in a moment" if is_outage else "upload it again if this goes on"
    return f"adapter {digest[:12]} could not be loaded: {failure_reason(digest, error)}; {hint}"


def failure_reason(digest: str, error: Exception | None) -> str:
    """Give the reason of a failed load without paths; an error that tells users nothing is logged."""
    if hasattr(error, "code"):  # the store's own errors are written for users
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    log.error("an adapter raised while loading", exc_info=error, extra={"digest": digest})
    return f"{type(error).__name__} (see the engine's log)"
