"""An OpenAI-compatible server on one machine: chat completions, streamed or whole, the list of its one model, health.

`build_app` is the whole of it for any ASGI server; `listen` and `run` put it on a port with uvicorn. Answers are
`model.chat`'s, one at a time (`answer_line`).
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..configuration_checks_mono_internvl import context_length
from ..image_loading_mono_internvl import DEFAULT_MAX_PIXELS
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from .answer_line import Answer, AnswerLine, Finished, LineFull
from .chat_request import ChatRequest, Limits, read_question
from .picture_sources import PictureSources
from .request_guard import LOOPBACK, Receive, Refused, RequestGuard, Send, error_body, refusal


logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Attributes:
        name: of the model, in requests and answers.
        sources: where pictures may come from; a body may have as many bytes as a picture.
        max_tiles: most tiles of a request's pictures; None: the model's.
        max_pixels: of a request's pictures together.
        max_requests: most requests that wait or are answered at once; others get a 503.
        names: names of the machine that requests may be sent to; None: any.
    """

    name: str
    sources: PictureSources
    max_tiles: int | str | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_requests: int = 64
    names: frozenset[str] | None = LOOPBACK


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def build_app(model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, options: ServerOptions) -> FastAPI:
    """The server of one model; its `state.line` holds the requests."""
    line = AnswerLine(model, processor, places=options.max_requests)
    limits = Limits(
        context=context_length(model.config.text_config),
        tile_tokens=processor.tokens_per_tile,
        token_characters=max(map(len, processor.tokenizer.get_vocab())),
        sources=options.sources,
        max_pixels=options.max_pixels,
        max_tiles=options.max_tiles,
        most_tiles=processor.image_processor.tile_limit(options.max_tiles),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(line.close)

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Mono-InternVL", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.line = line
    app.add_middleware(RequestGuard, max_bytes=options.sources.max_bytes, names=options.names)
    for kind, handler in (
        (RequestValidationError, _say_what_is_wrong),
        (HTTPException, _say_status),
        (Refused, _say_refusal),
        (Exception, _say_failure),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
    card = {"id": options.name, "object": "model", "created": int(time.time()), "owned_by": "local"}
    card["max_model_len"] = limits.context

    def check_name(name: str | None) -> None:
        if name is not None and name != options.name:
            reason = f"there is no model {name!r} here; this server has {options.name!r}"
            raise Refused(404, reason, param="model", code="model_not_found")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": line.running, "open": line.open}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_name(name)
        return card

    async def begin(body: ChatRequest, answer: Answer) -> tuple[AsyncIterator[str], str]:
        """The answer's pieces, and the first of them: what is wrong with a request comes up before it."""
        line.ask(answer, await read_question(body, limits))
        pieces = answer.pieces()
        return pieces, await anext(pieces, "")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_name(body.model)
        with contextlib.ExitStack() as place:
            try:
                answer = place.enter_context(line.place())
            except LineFull as error:
                raise Refused(503, str(error), headers={"Retry-After": "1"}) from error
            try:
                with _refusing():
                    pieces, first = await _unless_gone(request.receive, begin(body, answer))
                    if body.stream:
                        events = _events(options.name, answer, first, pieces, body)
                        return EventStream(events, place.pop_all())
                    text = await _unless_gone(request.receive, _joined(first, pieces))
            except ClientGone:
                return Response(status_code=499)
            return JSONResponse(_completion(options.name, answer, text))

    return app


# ---------------------------------------------------------------------------------------------------------- answers


async def _joined(first: str, pieces: AsyncIterator[str]) -> str:
    return first + "".join([piece async for piece in pieces])


def _head(name: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _usage(finished: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.answer_tokens,
        "total_tokens": finished.prompt_tokens + finished.answer_tokens,
    }


def _completion(name: str, answer: Answer, text: str) -> dict[str, Any]:
    assert answer.finished is not None
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finished.reason}
    return {**_head(name, "chat.completion"), "choices": [choice], "usage": _usage(answer.finished)}


async def _events(
    name: str, answer: Answer, first: str, pieces: AsyncIterator[str], body: ChatRequest
) -> AsyncIterator[str]:
    """Server-sent events of one answer. What goes wrong on the way is an event, too: the status has been sent."""
    head = _head(name, "chat.completion.chunk")
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    yield event({"role": "assistant", "content": ""})
    try:
        if first:
            yield event({"content": first})
        async for piece in pieces:
            yield event({"content": piece})
    except Exception as error:
        logger.exception("an answer broke off")
        yield _event(error_body(f"the answer broke off: {error}", "server_error"))
        return
    assert answer.finished is not None
    yield event({}, answer.finished.reason)
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer.finished)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events that end when the client leaves; the place of the request is free in either case."""

    def __init__(self, events: AsyncIterator[str], place: contextlib.ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._place = place

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        with self._place, contextlib.suppress(ClientGone):
            await _unless_gone(receive, self.stream_response(send))


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """What the work gives.

    Raises:
        ClientGone: the client left first; the work is cancelled.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ----------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What a request can cause becomes a refusal; anything else is a failure of the server's."""
    try:
        yield
    except (ValueError, OSError, RecursionError, ImportError) as error:  # a video, and nothing to read it
        raise Refused(400, str(error) or type(error).__name__) from error
    except (MemoryError, RuntimeError) as error:  # torch says RuntimeError of full memory
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        logger.warning("out of memory: %s", error)
        raise Refused(503, "the memory of this machine is too small for this request") from error


async def _say_what_is_wrong(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    at = ".".join(str(step) for step in first["loc"][1:])
    what = first["msg"].removeprefix("Value error, ")
    return refusal(400, f"{at}: {what}" if at else what, param=at or None)


async def _say_status(request: Request, error: HTTPException) -> Response:
    known = {404: f"there is no {request.url.path} here; /v1/chat/completions, /v1/models and /health are served"}
    return refusal(error.status_code, known.get(error.status_code, str(error.detail)), headers=error.headers)


async def _say_refusal(request: Request, error: Refused) -> Response:
    return refusal(error.status, str(error), **error.details)


async def _say_failure(request: Request, error: Exception) -> Response:
    # The traceback is in the server's log.
    return refusal(500, f"the server failed at this request ({type(error).__name__})")


# ---------------------------------------------------------------------------------------------------------- running


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and not yet listening, so that a taken port is known before a model is loaded.

    Raises:
        OSError: no such address, or it is taken; names it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return bound


def run(app: FastAPI, bound: socket.socket, *, access_log: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C: then no request is taken any more and open ones are answered. A second Ctrl-C ends
    those too."""
    # uvicorn's own configuration of the log would write to stdout.
    if access_log:
        log = logging.getLogger("uvicorn.access")
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    config = uvicorn.Config(app, log_config=None, access_log=access_log, lifespan="on")
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again when it is done, which would kill the process instead of ending it.
        signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[bound])
    finally:
        app.state.line.close()
        bound.close()
