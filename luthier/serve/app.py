"""The routes of the server."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from luthier import __version__
from luthier.core.log import info
from luthier.serve import chat, completions
from luthier.serve.admission import Admission
from luthier.serve.answers import Answers
from luthier.serve.convert import web_addresses
from luthier.serve.errors import ApiError, engine_ended, failed, loading, of_fields, of_status, stopping, wrong_kind
from luthier.serve.events import ClientGone, EventStream, while_connected
from luthier.serve.fields import HEADER, IgnoredFields
from luthier.serve.metrics import CONTENT_TYPE, Metrics
from luthier.serve.middleware import Surroundings, error_response
from luthier.serve.model import ChatModel, RewardModel
from luthier.serve.options import ServerOptions
from luthier.serve.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ScoreRequest,
    TokenizeRequest,
)
from luthier.serve.scoring import scored

CLIENT_CLOSED_REQUEST = 499
"""The status of a request whose client is gone. Nobody reads it but the metrics."""
MAX_FETCHING = 8
"""Requests whose images are fetched at the same time."""
Result = TypeVar("Result")
Requested = TypeVar("Requested", ChatRequest, CompletionRequest)
Prepared = TypeVar("Prepared", chat.Chat, completions.Completion)


class Service:
    """What the routes share. For the thread of the event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.admission = Admission(options.max_concurrent, options.max_queue)
        self.ignored = IgnoredFields()
        self.model: ChatModel | RewardModel | None = None
        """None while it is loading."""
        self.open: WeakSet[Answers] = WeakSet()
        """What is being answered."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        self._fetchers = ThreadPoolExecutor(max_workers=MAX_FETCHING, thread_name_prefix="fetching")

    def abort(self) -> None:
        """End all answers, each with an error that says why."""
        for answers in list(self.open):
            answers.abort(stopping())

    def close(self) -> None:
        for workers in (self._worker, self._fetchers):
            workers.shutdown(wait=False, cancel_futures=True)

    async def apart(self, work: Callable[..., Result], *args: Any) -> Result:
        """Work that takes long for long texts is done in a thread, one request at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *args)

    async def having_fetched(self, messages: Sequence[ChatMessage], model: ChatModel) -> ChatModel:
        """The model, which knows what is at the addresses in these messages. No other request waits for them."""
        rules = model.images
        urls = web_addresses(messages) if rules is not None and rules.allows_urls else []
        if rules is None or not urls:
            return model
        known = asyncio.get_running_loop().run_in_executor(self._fetchers, rules.having_fetched, urls)
        return replace(model, images=await known)

    @property
    def any_model(self) -> ChatModel | RewardModel:
        """Raises `ApiError` if the server takes no requests yet, or no longer."""
        if self.admission.is_stopping:
            raise stopping()
        if self.model is None:
            raise loading()
        return self.model

    @property
    def chat_model(self) -> ChatModel:
        model = self.any_model
        if not isinstance(model, ChatModel):
            raise wrong_kind("this server scores texts (stage: rm); POST /v1/score/evaluation")
        return model

    @property
    def reward_model(self) -> RewardModel:
        model = self.any_model
        if not isinstance(model, RewardModel):
            raise wrong_kind("this server writes answers and scores nothing; a run with stage: rm would")
        return model

    def log(self, what: str, value: Any) -> None:
        if self.options.is_verbose:
            info(f"{what}: {json.dumps(value, ensure_ascii=False)}")


def build(options: ServerOptions) -> tuple[FastAPI, Service]:
    """The application, whose model is set later."""
    service = Service(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        service.close()

    app = FastAPI(title="luthier api", version=__version__, lifespan=lifespan)
    app.add_middleware(Surroundings, keys=options.keys, metrics=service.metrics, root_path=options.root_path)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", HEADER],
        )
    _handle_errors(app)
    _add_state_routes(app, service)
    _add_answer_routes(app, service)
    _add_text_routes(app, service)
    return app, service


def _handle_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def of_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(of_status(error.status_code, request.url.path, request.method))
        response.headers.update(error.headers or {})
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(of_fields(error.errors(), error.body))

    async def broken(request: Request, error: Exception) -> Response:
        return error_response(failed())

    async def nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, of_router)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientGone, nobody)
    app.add_exception_handler(Exception, broken)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 when the model answers; 503 while it is loading, when its engine has died, and during shutdown."""
        model = service.any_model
        if model.fault is not None:
            raise engine_ended(model.fault)
        return JSONResponse({"status": "ok", "model": model.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts in the text format of Prometheus."""
        return PlainTextResponse(
            service.metrics.text(service.admission, service.model is not None), media_type=CONTENT_TYPE
        )

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        card = _card(service)
        if name != card["id"]:
            raise ApiError(
                f"there is no model {name!r}; this server has {card['id']!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return JSONResponse(card)


def _card(service: Service) -> dict[str, Any]:
    model = service.any_model
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "luthier"}
    return card | ({} if model.num_positions is None else {"max_model_len": model.num_positions})


def _add_answer_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """An answer to a conversation, whole or as server-sent events."""
        return await _respond(service, request, body, chat.prepared, chat.whole, chat.events)

    @app.post("/v1/completions")
    async def text_completions(request: Request, body: CompletionRequest) -> Response:
        """The continuation of one or more texts."""
        return await _respond(service, request, body, completions.prepared, completions.whole, completions.events)

    @app.post("/v1/score/evaluation")
    async def score_evaluation(request: Request, body: ScoreRequest) -> Response:
        """The scores that a reward model gives to texts."""
        model, headers = service.reward_model, service.ignored.headers(body)
        service.admission.enter(1)
        try:
            result = await while_connected(request.receive, service.apart(scored, body, model))
        finally:
            service.admission.leave()
        return JSONResponse(result, headers=headers)


async def _respond(
    service: Service,
    request: Request,
    body: Requested,
    prepared: Callable[[Requested, ChatModel], Prepared],
    whole: Callable[[Prepared, Answers], Coroutine[Any, Any, dict[str, Any]]],
    events: Callable[[Prepared, Answers], AsyncGenerator[bytes]],
) -> Response:
    """Check a request, ask the model, and answer as a whole or as a stream."""
    model, headers = service.chat_model, service.ignored.headers(body)
    service.admission.check()  # before the work on the prompt
    service.log("request", body.model_dump(exclude_none=True))
    messages = body.messages if isinstance(body, ChatRequest) else ()
    asked = await service.apart(prepared, body, await service.having_fetched(messages, model))
    answers = Answers(model, service.admission, service.metrics, asked.jobs)
    answers.start()
    service.open.add(answers)
    if body.stream:
        return EventStream(_logged(service, answers, events(asked, answers)), answers.close, headers)
    return await _whole(service, request, answers, whole(asked, answers), headers)


async def _logged(service: Service, answers: Answers, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events; after the last one, the answers go to the log as those that are not streamed do."""
    async with aclosing(events):
        async for data in events:
            yield data
    service.log(
        "answer",
        [
            {"index": number, "text": answer.text, "finish_reason": answer.finish_reason}
            for number, answer in sorted(answers.ended.items())
        ],
    )


async def _whole(
    service: Service,
    request: Request,
    answers: Answers,
    work: Coroutine[Any, Any, dict[str, Any]],
    headers: dict[str, str],
) -> Response:
    try:
        result = await while_connected(request.receive, work)
    finally:
        answers.close()
    service.log("answer", result["choices"])
    return JSONResponse(result, headers=headers)


def _add_text_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> JSONResponse:
        """The token ids of a text (`prompt`), or of the prompt for a conversation (`messages`)."""
        headers = service.ignored.headers(body)
        model = service.any_model
        if isinstance(model, ChatModel):
            model = await service.having_fetched(body.messages or (), model)
        ids = await service.apart(_token_ids, body, model)
        limit = service.any_model.num_positions
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": limit}, headers=headers)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> JSONResponse:
        """The text of token ids."""
        model, headers = service.any_model, service.ignored.headers(body)
        wrong = next((number for number, i in enumerate(body.tokens) if i >= len(model.tokenizer)), None)
        if wrong is not None:
            raise ApiError(f"tokens[{wrong}]: the tokenizer has no such token", param=f"tokens[{wrong}]")
        return JSONResponse({"prompt": str(model.tokenizer.decode(body.tokens))}, headers=headers)


def _token_ids(body: TokenizeRequest, model: ChatModel | RewardModel) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("prompt: send either a text (prompt) or a conversation (messages)", param="prompt")
    if body.prompt is not None:
        adds = body.add_special_tokens is not False
        return list(model.tokenizer.encode(body.prompt, add_special_tokens=adds))
    if not isinstance(model, ChatModel):
        raise wrong_kind("this server scores texts (stage: rm), which have no chat format")
    assert body.messages is not None
    return chat.prompt_of(model, body.messages, body.tools, body.chat_template_kwargs)
