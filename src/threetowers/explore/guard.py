"""What stands between the network and the page: who may ask, how much, and how many at a time.

The server reads and computes for whoever reaches it. Other pages in the same browser reach it too, so the Host and
Origin of every request are checked: a foreign page can neither send requests in its own name nor, by pointing a name of
its own to this address, read answers. Beyond loopback a token is needed as well.
"""

import asyncio
import ipaddress
import platform
import secrets

from starlette.datastructures import Headers, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "threetowers_token"
UPLOAD = "/api/upload"
UPLOAD_BYTES = 24 * 2**20
"""Of an uploaded image file."""
BODY_BYTES = 64 * 2**10
"""Of any other request."""
READ_SECONDS = 20.0
"""A request that takes longer to arrive is dropped."""
WAITING = 64
"""Requests that are answered or wait at a time; further ones are told to come back."""
READING = 4
"""Uploads that are held in memory at a time."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(host: str) -> str:
    """The name in a Host header, without its port and brackets; empty for what is no such header.

    >>> [name_of(text) for text in ("localhost:80", "[::1]:80", "a b", "evil.example@localhost")]
    ['localhost', '::1', '', '']
    """
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or (rest[0] == ":" and rest[1:].isdecimal())) else ""
    name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdecimal()):
        return ""
    return name.lower() if name and all(c.isalnum() or c in "-._" for c in name) else ""


class Guard:
    """An ASGI application in front of another one; what it refuses, the other never sees.

    host: what the server is bound to. token: what every request must show, or None.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self.app, self.host, self.token = app, host, token
        self.names = {*LOOPBACK, host.lower()}
        if host in EVERYWHERE:
            self.names |= {platform.node().lower(), f"{platform.node().lower()}.local"}
        self._inside = 0
        self._reading = asyncio.Semaphore(READING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an HTTP request, by itself where it refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        send = with_headers(send)
        refusal = self._refusal(scope) or self._welcome(scope)
        if refusal is None and self._inside >= WAITING:
            refusal = refused(503, "too many requests wait; try again in a second")
            refusal.headers["retry-after"] = "1"
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._inside += 1
        try:
            if scope["path"] == UPLOAD:
                async with self._reading:
                    await self._answer(scope, receive, send, UPLOAD_BYTES)
            else:
                await self._answer(scope, receive, send, BODY_BYTES)
        finally:
            self._inside -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is refused by its headers; None for one that is not."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(name_of(hosts[0])):
            return refused(403, "this server answers to its own address only")
        if any(origin not in self._origins(hosts[0]) for origin in headers.getlist("origin")):
            return refused(403, "requests of other pages are refused")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return refused(403, "requests of other pages are refused")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return refused(405, "GET and POST are answered")
        return None

    def _welcome(self, scope: Scope) -> Response | None:
        """Why a request is refused for want of the token, or the cookie for whoever brought it in the address."""
        if self.token is None:
            return None
        headers = Headers(scope=scope)
        given = QueryParams(scope["query_string"]).get("token", "")
        if scope["path"] == "/" and self._is_token(given):
            answer = RedirectResponse("/", 303)  # so that the token leaves the address
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
            return answer
        if self._is_token(headers.get("authorization", "").removeprefix("Bearer ")):
            return None
        cookies = (cookie_parser(header).get(COOKIE, "") for header in headers.getlist("cookie"))
        if any(self._is_token(value) for value in cookies):
            return None
        return refused(401, "open the address with ?token= that the server printed when it started")

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return secrets.compare_digest(given.encode(), self.token.encode())

    def _is_own(self, name: str) -> bool:
        if name in self.names:
            return True
        if self.host not in EVERYWHERE:
            return False
        try:  # an address is no name that somebody else can point here
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _origins(self, host: str) -> tuple[str, str]:
        return f"http://{host}", f"https://{host}"

    async def _answer(self, scope: Scope, receive: Receive, send: Send, largest: int) -> None:
        """Reads the whole body within its limits, and hands it on."""
        length = Headers(scope=scope).get("content-length", "0")
        too_large = refused(413, f"at most {largest:,} bytes are taken")
        if not length.isdecimal() or int(length[:20]) > largest:
            await too_large(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > largest:
                        await too_large(scope, receive, send)
                        return
        except TimeoutError:
            await refused(408, "the request did not arrive in time")(scope, receive, send)
            return
        await self.app(scope, replayed(bytes(body), receive), send)


def replayed(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, and then what `receive` gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def with_headers(send: Send) -> Send:
    """A `send` that adds HEADERS to every answer, and forbids to keep it where nothing else is said."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            added = HEADERS if b"cache-control" in given else {**HEADERS, "cache-control": "no-store"}
            message["headers"] = [
                *message["headers"], *((name.encode(), value.encode()) for name, value in added.items())
            ]  # fmt: skip
        await send(message)

    return sending


def refused(status: int, why: str) -> Response:
    """An answer that says why there is none."""
    return JSONResponse({"error": why}, status)
