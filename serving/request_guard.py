"""What stands in front of the server: how much a request may send, of what kind, and to which name of the machine."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# A body must arrive in this time; one that is too long is read on for a while, or the client would not hear why.
_BODY_SECONDS = 60.0
_TIMES_READ_ON = 4
# Bodies of all open requests, in bodies of the largest size.
_HELD_AT_ONCE = 16
# Each becomes an object of tens of bytes, one after the other; a conversation has thousands at most.
_MAX_ITEMS = 1_000_000
_LONGEST_MESSAGE = 1000
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Refused(Exception):
    """A request that is not answered: HTTP status and reason."""

    def __init__(self, status: int, reason: str, **details: Any):
        super().__init__(reason)
        self.status, self.details = status, details


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    # JSON can bring half of a surrogate pair, which cannot be sent back.
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(message) > _LONGEST_MESSAGE:  # it names what was sent
        message = f"{message[: _LONGEST_MESSAGE - 100]} ... {message[-90:]}"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, **details: Any) -> JSONResponse:
    """A response that says what is wrong with a request."""
    headers = details.pop("headers", None)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, kind, **details), status_code=status, headers=headers)


class RequestGuard:
    """ASGI middleware: bodies are read whole within a limit of bytes and time, and are JSON.

    Args:
        max_bytes: of a body; those of all open requests may have 16 times as many.
        names: the names of the machine that a request may be sent to; None: any. A page of a stranger whose name was
            made to resolve to this machine would otherwise be of one origin with a server that listens here only.
    """

    def __init__(self, app: Any, *, max_bytes: int, names: frozenset[str] | None):
        self.app, self.max_bytes, self.names = app, max_bytes, names
        self._held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, body = Headers(scope=scope), b""
        try:
            self._check_name(headers.get("host", ""))
            if scope["method"] in ("POST", "PUT", "PATCH"):
                # A page of a stranger can send other kinds without asking the server first.
                kind = headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise Refused(415, f"the body must be application/json, not {kind or 'of no type'}")
                body = await self._body(receive)
                receive = _replayed(body, receive)
            if self._held + len(body) > _HELD_AT_ONCE * self.max_bytes:
                reason = "the requests that are open have as many bytes as this server takes at once; try again"
                raise Refused(503, reason, headers={"Retry-After": "1"})
        except Refused as error:
            await refusal(error.status, str(error), **error.details)(scope, receive, send)
            return
        self._held += len(body)
        try:
            await self.app(scope, receive, send)
        finally:
            self._held -= len(body)

    def _check_name(self, host: str) -> None:
        if self.names is None:
            return
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name not in self.names:
            raise Refused(403, "this server answers requests to localhost only (--host)")

    async def _body(self, receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(self._read(receive), _BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from error

    async def _read(self, receive: Receive) -> bytes:
        body, size, more = bytearray(), 0, True
        while more and size <= self.max_bytes * _TIMES_READ_ON:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client left before its request had come")
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size <= self.max_bytes:
                body += message.get("body", b"")
            else:
                body.clear()
        if size > self.max_bytes:
            raise Refused(413, f"the body has more than the {self.max_bytes:,} bytes that one may have (--max-body)")
        if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MAX_ITEMS:
            raise Refused(413, f"the body has more than {_MAX_ITEMS:,} brackets and commas")
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
