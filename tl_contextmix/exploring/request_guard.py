"""Lets in the page that was opened, by its token, under the name of this host, and nobody else.

A server on loopback is reached by every page in the same browser and by every user of the machine.
The token keeps out both; the name of the host, a page that has its own name resolve to this machine
(DNS rebinding); origin and kind of a request, pages that send to addresses they cannot read.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""What every answer says."""


class Guard:
    """The application behind a door.

    Args:
        app: The application.
        token: First part of every path.
        hosts: Names of this server, with its port.
    """

    def __init__(self, app: Application, token: str, hosts: Sequence[str]) -> None:
        self.app, self.token = app, token.encode()
        self.hosts = {host.encode() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] != "http":
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        refused = self.refusal(scope)
        if not refused:
            await self.app(scope, receive, sent)
            return
        plain = [(b"content-type", b"text/plain; charset=utf-8")]
        await sent({"type": "http.response.start", "status": 403, "headers": plain})
        await sent({"type": "http.response.body", "body": f"{refused}\n".encode()})

    def refusal(self, scope: Scope) -> str:
        """Returns why a request is refused; empty if it is not."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        named = [value for name, value in headers if name == b"host"]
        if len(named) != 1 or named[0].lower() not in self.hosts:
            return "This server does not go by that name."
        token = scope["path"].encode(errors="surrogateescape").split(b"/")[1:2] or [b""]
        if not hmac.compare_digest(token[0], self.token):
            return "Wrong address: open the one that was printed."
        if scope["method"] in ("GET", "HEAD"):
            return ""
        origin = [value for name, value in headers if name == b"origin"]
        site = [value for name, value in headers if name == b"sec-fetch-site"]
        if any(value != b"http://" + named[0] for value in origin) or any(
            value != b"same-origin" for value in site
        ):
            return "Only the page of this server may send."
        return ""
