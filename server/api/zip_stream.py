"""Send an artifact as a zip of a length that is known, and read no more of it than the client takes."""

from __future__ import annotations

import contextlib
from contextlib import aclosing

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters_store.format.archive import ZIP_TYPE
from server.api.disconnect import ClientGoneError, unless_disconnected
from server.uploads.service import Download


class ZipStream(Response):
    """Sends a download, and closes it at any end. If the store fails meanwhile, the answer breaks off.

    An answer to HEAD has no body.
    """

    media_type = ZIP_TYPE

    def __init__(self, download: Download, filename: str, is_head: bool) -> None:
        self.download, self.is_head = download, is_head
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(
            {
                "Content-Disposition": f'attachment; filename="{filename}"',
                "Content-Length": str(download.outline.num_bytes),
                "ETag": f'"{download.digest}"',
            }
        )

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the zip ends or the client has gone."""
        try:
            with contextlib.suppress(ClientGoneError):  # nobody reads on
                await unless_disconnected(receive, self._write(send))
        finally:
            await self.download.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if not self.is_head:
            async with aclosing(self.download.chunks()) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
