"""Brings what HTTP allows into the one shape that the routes know: HEAD as GET, and absolute targets as paths."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send


class PlainTargets:
    """Answers HEAD as GET (the protocol leaves the body out) and `GET http://host/path`, as proxies send it.

    The authority of an absolute target stands before the Host header (RFC 9112, section 3.2.2).
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = dict(scope)
            if scope["method"] == "HEAD":
                scope["method"] = "GET"
            if scope["path"].lower().startswith(("http://", "https://")):
                _make_relative(scope)
        await self._app(scope, receive, send)


def _make_relative(scope: Scope) -> None:
    try:
        target = urlsplit(scope["raw_path"].decode("latin-1"))
    except ValueError:
        return  # no URL, and so no path that a route has
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", target.netloc.encode("latin-1")), *others]
    scope["path"], scope["raw_path"] = unquote(target.path) or "/", target.path.encode("latin-1") or b"/"
