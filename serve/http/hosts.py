"""Refuses requests that another site's page sends through a browser: DNS rebinding and foreign origins.

A page of evil.example whose name later resolves to 127.0.0.1 reaches a server without a key as if it were its own
site. Its requests still carry `Host: evil.example`, and that is what gives it away.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.errors import ApiError


class HostCheck:
    """Lets through requests for an IP address, localhost or a name in `names`.

    An Origin, where there is one, must be the server's own or in `origins`.
    A rebound name is never an IP address, so addresses are safe whichever they are.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], origins: Collection[str] = ()):
        self._app, self._names = app, frozenset(name.lower() for name in names)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            body = error.body_for(scope["path"])
            return await JSONResponse(body, error.status)(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._trusted(host):
            message = f"Host is {host[:100]!r}, which is not a name of this server; start it with --allow-host=NAME."
            return ApiError(403, message, None, "host_not_allowed")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        same = b"origin" not in headers or origin.partition("://")[2] == host
        if same or not self._origins.isdisjoint({origin, "*"}):
            return None
        message = (
            f"Origin {origin[:100]!r} is another site; start the server with --cors-origin to let it in."
        )
        return ApiError(403, message, None, "origin_not_allowed")

    def _trusted(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", *self._names) or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def shown_host(host: str) -> str:
    """The host as a URL has it: IPv6 addresses in brackets, and localhost for addresses that mean this machine."""
    if host in ("127.0.0.1", "0.0.0.0", "::", "::1", ""):
        return "localhost" if host != "::1" else "[::1]"
    return f"[{host}]" if ":" in host else host
