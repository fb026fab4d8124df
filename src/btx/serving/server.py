"""`btx serve`: a page to talk to the models of a run, and OpenAI's interface to them.

It listens on loopback unless told otherwise, asks nothing of anybody else, and a browser lets no other page speak to
it: requests have to be JSON, from the page's own origin, to a host name that is its own.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from btx.errors import BtxError, CheckpointError, UserError
from btx.process import Log
from btx.serving.replies import Reply, error_event, error_reply
from btx.serving.requests import ChatRequest, CompletionRequest, Refused, read_request
from btx.serving.sampling import Sampling
from btx.system_errors import told

if TYPE_CHECKING:
    from btx.serving.speaker import Speaker

LARGEST_REQUEST = 4_000_000
"""Bytes."""
NEW_TOKENS = 256
"""Of an answer, where the request does not say."""
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


class Speakers:
    """The models that are served, each loaded when it is first asked for.

    Args:
        paths: name → model folder; the first is the one that answers where none is named.
    """

    def __init__(self, paths: Mapping[str, Path], log: Log) -> None:
        self.paths, self.log = dict(paths), log
        self._loaded: dict[str, Speaker] = {}
        self._loading = threading.Lock()
        self.closing = threading.Event()
        """Set when the server ends: answers under way are given up."""

    def named(self, name: str) -> str:
        """The name, if there is such a model; raises Refused if not."""
        if name not in self.paths:
            raise Refused(f"there is no model {name!r} here; there are: {', '.join(self.paths)}", 404,
                          param="model", code="model_not_found")  # fmt: skip
        return name

    def get(self, name: str | None) -> tuple[str, Speaker]:
        """A model by its name, the first where none is named, and the name."""
        name = self.named(name or next(iter(self.paths)))
        with self._loading:
            if name not in self._loaded:
                from btx.serving.speaker import Speaker

                self.log(f"loading {name} ({self.paths[name]})")
                self._loaded[name] = Speaker(self.paths[name])
        return name, self._loaded[name]


def make_app(speakers: Speakers, hosts: list[str]) -> Starlette:
    """The application, for uvicorn or a test."""
    answers = _Answers(speakers)
    return Starlette(
        routes=[
            *[Route(f"/{'' if file == 'index.html' else file}", _page(file, kind)) for file, kind in FILES.items()],
            Route("/v1/models", answers.models), Route("/v1/models/{name:path}", answers.model),
            Route("/model", answers.described),
            Route("/v1/chat/completions", partial(answers.completion, ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(answers.completion, CompletionRequest), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
                    Middleware(_OwnPagesOnly)],
        exception_handlers={HTTPException: _told_as_openai_does, BtxError: _refused, Exception: _failed},
    )  # fmt: skip


class _OwnPagesOnly:
    """Refuses what a browser sends for a page of another origin, but for following a link to the page itself. Programs
    send neither header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answers = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
            if foreign or (site not in ("none", "same-origin") and scope["path"] != "/"):
                refusal = error_reply(f"pages of another origin ({origin or site}) are not answered")
                answers = JSONResponse(refusal, 403)
        await answers(scope, receive, send)


async def _told_as_openai_does(request: Request, error: Any) -> Response:
    """No such address, or no such method."""
    there_is = "/v1/models, /v1/chat/completions, /v1/completions"
    message = f"{request.method} {request.url.path}: {error.detail}; there is {there_is}"
    return JSONResponse(error_reply(message), error.status_code, headers=error.headers)


async def _refused(request: Request, error: Any) -> Response:
    """What btx raises on purpose."""
    ours = isinstance(error, CheckpointError) or not isinstance(error, UserError)
    status = error.status if isinstance(error, Refused) else 500 if ours else 400
    param, code = (error.param, error.code) if isinstance(error, Refused) else (None, None)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(error_reply(str(error), kind, param=param, code=code), status)


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody has foreseen; Starlette raises it again, so that its traceback is printed."""
    return JSONResponse(error_reply(_why(error), "server_error"), 500)


def _why(error: Exception) -> str:
    return str(told(error) or f"{type(error).__name__}: {error}")


class _Answers:
    """The endpoints. What computes is done in threads, so that others are answered meanwhile."""

    def __init__(self, speakers: Speakers) -> None:
        self.speakers = speakers

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_listed(name) for name in self.speakers.paths]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_listed(self.speakers.named(request.path_params["name"])))

    async def described(self, request: Request) -> Response:
        name, speaker = await run_in_threadpool(self.speakers.get, request.query_params.get("model"))
        return JSONResponse({"model": name, "experts": speaker.expert_names, "has_template": speaker.has_template,
                             "longest": speaker.longest})  # fmt: skip

    async def completion(self, kind: type[ChatRequest] | type[CompletionRequest], request: Request) -> Response:
        asked = read_request(kind, await _body(request))
        reply = await run_in_threadpool(begin, self.speakers, asked)
        if asked.stream:
            headers = {"cache-control": "no-store"}
            return StreamingResponse(_guarded(reply), media_type="text/event-stream", headers=headers)
        watching = asyncio.create_task(_left(request, reply))
        try:
            return JSONResponse(await run_in_threadpool(reply.whole))
        finally:
            watching.cancel()


def _listed(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "btx"}


async def _left(request: Request, reply: Reply) -> None:
    """Give an answer up when who asked has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    reply.is_left = True


async def _body(request: Request) -> bytes:
    """The request's JSON. A form, which a browser would send for any page, is no JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("a request has to say content-type: application/json", 415)
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_REQUEST:
            raise Refused(f"a request may have {LARGEST_REQUEST:,} bytes", 413)
    return body


def begin(speakers: Speakers, asked: ChatRequest | CompletionRequest) -> Reply:
    """The reply to a request, not yet computed."""
    from btx.serving.speaker import prompt_ids, text_ids

    name, speaker = speakers.get(asked.model)
    limit = asked.max_tokens
    if isinstance(asked, ChatRequest):
        limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else limit
        messages = [message.as_message() for message in asked.messages]
        # A base model takes the last message as the text to complete: so the page can show it beside the others.
        ids = prompt_ids(speaker.tokenizer, messages if speaker.has_template else messages[-1]["content"])
    else:
        ids = text_ids(speaker.tokenizer, asked.text)
    rng_seed = secrets.randbelow(2**63) if asked.seed is None else asked.seed
    sampling = Sampling(NEW_TOKENS if limit is None else limit, asked.temperature, asked.top_p, rng_seed, asked.stops)
    answer = speaker.answer(ids, sampling, asked.choice)
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    chat = isinstance(asked, ChatRequest)
    return Reply(chat, name, speaker.expert_names, asked.routing, answer, speakers.closing, with_usage)


def _guarded(reply: Reply) -> Iterator[bytes]:
    """A stream that tells of what fails in its middle: its head has been sent by then."""
    try:
        yield from reply.stream()
    except Exception as error:
        yield error_event(_why(error))


def _page(file: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files("btx.serving") / "page" / file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers={
            "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        })  # fmt: skip

    return page


def serve(paths: Mapping[str, Path], *, host: str, port: int, log: Log) -> None:
    """Serve models until Ctrl-C.

    Args:
        paths: name → model folder; the first answers where none is named.
        port: 0 takes a free one.
    """
    speakers = Speakers(paths, log)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"btx serve: {host}:{port} cannot be listened on: {error.strerror or error}; "
                        f"choose another --port, or 0 for a free one") from error  # fmt: skip
    with listening:
        speakers.get(None)
        port = listening.getsockname()[1]
        loopback = host in ("127.0.0.1", "localhost", "::1")
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]"] if loopback else ["*"]
        if not loopback:
            log(f"warning: listening on {host}: whoever reaches this machine can use the models; there is no password")
        shown = f"[{host}]" if ":" in host else host
        log(f"http://{shown}:{port}   (the same interface as OpenAI's: http://{shown}:{port}/v1; Ctrl-C ends)")
        config = uvicorn.Config(make_app(speakers, hosts), log_level="warning", access_log=False,
                                timeout_graceful_shutdown=1)  # fmt: skip

        class Server(uvicorn.Server):
            def handle_exit(self, signal: int, frame: Any) -> None:
                speakers.closing.set()
                super().handle_exit(signal, frame)

        Server(config).run(sockets=[listening])
