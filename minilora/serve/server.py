"""The API over HTTP, by Starlette and uvicorn (the extra `serve`).

    GET  /                      the page to chat in
    GET  /v1/models             the one that is served, in a list
    GET  /v1/models/NAME        by itself
    POST /v1/chat/completions   an answer, whole or as a stream of events

A page of another origin can ask nothing: JSON alone is taken, which a browser sends to strangers only if these say so,
and no answer does. Nor can one whose own name leads to a loopback address here: see `names_of`.
"""

import asyncio
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from errno import EMFILE, ENFILE
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minilora.checkpoint.json_file import short, to_json
from minilora.errors import UserError
from minilora.serve.line import Line
from minilora.serve.request import Ask, Offer, Refused, read_ask
from minilora.train.signals import StopRequest

MAX_BODY = 1_000_000  # bytes; far more than a prompt that fits
GRACE_S = 1  # that a token may take where the server is to end
GONE = Response(status_code=400)  # to a client that does not read it any more


def make_app(line: Line, offer: Offer, names: tuple[str, ...] = ()) -> ASGIApp:
    """names: what the server may be called in a request, see `names_of`"""
    began, page = int(time.time()), Path(__file__).with_name("page.html").read_text("utf-8")

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page)

    async def models(request: Request) -> Response:
        model = {"id": offer.name, "object": "model", "created": began, "owned_by": "minilora"}
        offer.check_model(request.path_params.get("id", offer.name))
        return _json(model if request.path_params else {"object": "list", "data": [model]})

    async def complete(request: Request) -> Response:
        ask = await asyncio.to_thread(read_ask, await _body(request), offer)  # a megabyte takes its time
        if ask.stream:
            return StreamingResponse(_events(line, offer, ask), media_type="text/event-stream")
        work, gone = asyncio.ensure_future(_whole(line, offer, ask)), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            return _json(await work) if work.done() else GONE
        finally:
            work.cancel()
            gone.cancel()

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", models),  # a name may hold slashes
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), _wrong),
    )

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        host = (request := Request(scope)).headers.get("host", "")
        if names and re.sub(r":\d*\Z", "", host).lower() not in names:
            refused = Refused(f"the host {short(host)} is none of {', '.join(names)}; ask by one of these", status=403)
            await (await _wrong(request, refused))(scope, receive, send)
        else:
            await app(scope, receive, send)

    return answer


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the content-type must be application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(f"the body has more than {MAX_BODY:,} bytes; ask for less", status=413)
    return bytes(body)


# -- Answers -----------------------------------------------------------------------------------------------------------


def _frame(kind: str, offer: Offer) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": offer.name}


def _usage(ask: Ask, n_new: int) -> dict[str, int]:
    n = len(ask.prompt)
    return {"prompt_tokens": n, "completion_tokens": n_new, "total_tokens": n + n_new}


async def _whole(line: Line, offer: Offer, ask: Ask) -> dict[str, Any]:
    frame = _frame("chat.completion", offer)
    async with aclosing(line.answer(ask)) as pieces:
        said = [piece async for piece in pieces]
    _, n, why = said[-1]
    message = {"role": "assistant", "content": "".join(text for text, *_ in said)}
    choice = {"index": 0, "message": message, "finish_reason": why}
    return {**frame, "choices": [choice], "usage": _usage(ask, n)}


async def _events(line: Line, offer: Offer, ask: Ask) -> AsyncIterator[str]:
    """Server-sent events. The response has begun, so what fails is one, too."""
    frame, n = _frame("chat.completion.chunk", offer), 0

    def event(delta: Mapping[str, str], why: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": why}
        return _event({**frame, "choices": [choice]} | ({"usage": None} if ask.usage else {}))

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(line.answer(ask)) as pieces:
            async for text, n, why in pieces:  # noqa: B007 - n is told at the end
                if text:
                    yield event({"content": text})
                if why:
                    yield event({}, why)
    except Exception as error:
        yield _event(_failure(error))
        return
    if ask.usage:
        yield _event({**frame, "choices": [], "usage": _usage(ask, n)})
    yield "data: [DONE]\n\n"


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {to_json(document)}\n\n"


def _json(document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(document), status, headers, "application/json")


# -- What is not answered ----------------------------------------------------------------------------------------------


def _error(message: str, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


async def _wrong(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return GONE
    if isinstance(error, Refused):
        return _json(_error(str(error), "invalid_request_error", error.field, error.code), error.status)
    if isinstance(error, HTTPException):  # no such path, or not by this method
        said = str(UserError(f"{request.method} {request.url.path}: {error.detail}"))
        return _json(_error(said, "invalid_request_error"), error.status_code, error.headers)
    return _json(_failure(error), 500)


def _failure(error: Exception) -> dict[str, Any]:
    """What the client is told of a fault of ours; whoever runs the server sees it whole."""
    if isinstance(error, UserError):
        print(error, file=sys.stderr, flush=True)
        return _error(str(error), "server_error")
    traceback.print_exception(error)
    return _error("the answer failed; what the server has printed says why", "server_error")


# -- A life ------------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients may connect to, and wait. Raises UserError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: cannot listen there: {why}; name another --port or --host") from None


def names_of(listening: socket.socket, host: str) -> tuple[str, ...]:
    """What requests to a loopback address may call it; () for another address: any name.

    Else a page that someone visits could have its own name lead to it (DNS rebinding), and would be of one origin with
    the server.
    """
    local = ip_address(listening.getsockname()[0]).is_loopback
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", host.lower()))) if local else ()


class Server(uvicorn.Server):
    """uvicorn that says nothing, waits a second for answers where it is to end, and is the same whatever is installed.

    Where no file descriptor is free asyncio lets who connects wait, and tries again each second. It would say so in
    thousands of lines, and says it in one a minute.
    """

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, log_level="critical",
            access_log=False, timeout_graceful_shutdown=1,
        ))  # fmt: skip
        self._quiet_until = 0.0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._hear)
        await super().serve(sockets)

    def _hear(self, loop: asyncio.AbstractEventLoop, fault: dict[str, Any]) -> None:
        full = getattr(fault.get("exception"), "errno", None) in (EMFILE, ENFILE)
        if full and time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + 60
            print("no file descriptor is free: who connects waits; raise `ulimit -n`", file=sys.stderr, flush=True)
        elif not full and not self.should_exit:  # else it has tried again where nobody listens any more
            loop.default_exception_handler(fault)


def run(app: ASGIApp, line: Line, listening: socket.socket, hello: str) -> None:
    """Say hello and serve until a signal. Raises Stopped."""
    server = Server(app)
    thread = Thread(target=server.run, args=[[listening]])
    with StopRequest() as stop:
        print(UserError(hello), flush=True)  # a folder's name may hold anything
        thread.start()
        while stop.signum is None and thread.is_alive():
            thread.join(0.1)  # a signal is heard in between
        server.should_exit = True
        thread.join()
        if stop.signum is not None and not line.ends(GRACE_S):
            os._exit(128 + stop.signum)  # a prompt is being read, for nobody, and Python would wait for it
        stop.follow("stopped")
