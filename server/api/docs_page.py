"""The page that shows the OpenAPI document: one answer made of own files, which loads nothing but the document."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

STYLE, SCRIPT = "/* style */", "/* script */"  # places in the page


def docs_page() -> Response:
    """Make the answer. Its policy lets no script run but the page's own, and asks no server but this one."""
    page, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(page, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The page with its style and script within, so that it needs no other path, and the policy that names their
    hashes."""
    folder = files("server.api") / "docs"
    style, script = [(folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")]
    page = (folder / "page.html").read_text(encoding="utf-8").replace(STYLE, style).replace(SCRIPT, script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
