"""The HTTP routes: OpenAI's API, health and metrics."""

import time
from importlib import metadata

import msgspec
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from services.core.errors import BadRequest, UnknownModel
from services.gateway.api.body import Bodies
from services.gateway.api.document import ERRORS, DocumentedApp, streamed
from services.gateway.api.edge import Edge
from services.gateway.api.exchange import Exchange
from services.gateway.api.http_errors import install_error_handlers
from services.gateway.api.reply import ChoicesReply
from services.gateway.api.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    ModelList,
    RouteAnswer,
    Version,
)
from services.gateway.api.responses_api.routes import add_responses
from services.gateway.api.schema import (
    AnyRequest,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingsRequest,
    GenerationRequest,
)
from services.gateway.api.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenization,
    Tokenized,
    TokenizeRequest,
)
from services.gateway.door.door import LockedDoor
from services.gateway.gateway import Gateway
from services.gateway.path.record import Record

ENDPOINTS = {
    "/v1/chat/completions": "chat_completions",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
}

# For the OpenAPI page; the header is read in services/gateway/door/door.py.
_KEY = Security(
    HTTPBearer(
        scheme_name="API key",
        description="A key that the operator has given out; where none are configured, any key or none. "
        "Requests of different keys share no cached prompts.",
        auto_error=False,
    )
)


def build_app(gateway: Gateway) -> FastAPI:
    app = DocumentedApp(title="Diptych", description="OpenAI's API over a disaggregated LLM cluster")
    app.keys_optional = not isinstance(gateway.door, LockedDoor)
    bodies = Bodies(gateway.config.body_bytes_max, gateway.config.bodies_bytes_max)
    gateway.metrics.body_bytes.set_function(lambda: bodies.bytes)
    app.add_middleware(Edge, clock=gateway.clock, door=gateway.door, bodies=bodies)
    install_error_handlers(app, gateway.metrics, ENDPOINTS)
    _add_generation(app, gateway)
    add_responses(app, gateway, key=_KEY)
    _add_explanation(app, gateway)
    _add_tokenization(app, gateway)
    _add_models(app, gateway)
    _add_operation(app, gateway)
    return app


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=streamed(ChatCompletionChunk),
        dependencies=[_KEY],
    )
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """With `stream`, server-sent events of chat.completion.chunk objects."""
        return _choices(gateway, "chat_completions", body, http)

    @app.post(
        "/v1/completions", response_model=Completion, responses=streamed(Completion), dependencies=[_KEY]
    )
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """With `stream`, server-sent events of text_completion objects."""
        return _choices(gateway, "completions", body, http)


def _choices(gateway: Gateway, endpoint: str, body: GenerationRequest, http: Request) -> Exchange:
    received_at, keeps_routes = http.state.received_at, body.explain is True
    record = Record(endpoint, gateway.clock, gateway.metrics, received_at, keeps_routes=keeps_routes)
    return Exchange(gateway, ChoicesReply(body, gateway.prompts, record, http.state.request_id), http)


def _add_explanation(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/route", responses=ERRORS, dependencies=[_KEY])
    async def explain(body: AnyRequest, http: Request) -> RouteAnswer:
        """Where a request with this body would go now, and why. Nothing is computed or reserved for it."""
        return await gateway.explain(body, http.state.visit.tenant)


def _add_tokenization(app: FastAPI, gateway: Gateway) -> None:
    tokenization = Tokenization(gateway)

    @app.post("/tokenize", response_model=Tokenized, responses=ERRORS, dependencies=[_KEY])
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a chat as the model's template writes it."""
        return await tokenization.tokenize(body)

    @app.post("/detokenize", response_model=Detokenized, responses=ERRORS, dependencies=[_KEY])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text that token ids stand for, special tokens written out."""
        return await tokenization.detokenize(body)

    @app.post("/v1/embeddings", responses=ERRORS, dependencies=[_KEY], status_code=400)
    async def embeddings(body: EmbeddingsRequest) -> None:
        """Always refused: models that write answers do not embed."""
        gateway.prompts.check_model(body.model)
        raise BadRequest(f"The model '{body.model}' writes answers; it gives no embeddings.", "model")


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    started = int(time.time())

    def described() -> Model:
        context_tokens_max = gateway.view.context_tokens_max(gateway.model.context_tokens_max)
        return Model(
            id=gateway.model.name,
            object="model",
            created=started,
            owned_by="diptych",
            max_model_len=context_tokens_max,
        )

    @app.get("/v1/models", responses=ERRORS, dependencies=[_KEY])
    async def models() -> ModelList:
        return ModelList(object="list", data=[described()])

    @app.get("/v1/models/{model_id:path}", responses=ERRORS, dependencies=[_KEY])
    async def model(model_id: str) -> Model:
        if model_id != gateway.model.name:
            raise UnknownModel(f"The model '{model_id}' does not exist.", "model")
        return described()


def _add_operation(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/health/ready", responses={503: {"description": "Not ready; `status` tells why"}})
    async def ready() -> JSONResponse:
        if gateway.ready:
            return JSONResponse({"status": "ready"})
        reason = "draining" if gateway.draining else "no decode worker is ready"
        return JSONResponse({"status": reason}, status_code=503)

    @app.get("/version", responses=ERRORS, dependencies=[_KEY])
    async def version() -> Version:
        return Version(version=metadata.version("diptych"))

    @app.get("/v1/cluster", include_in_schema=False)
    async def cluster() -> Response:
        """The workers' last reports, for `diptych status`."""
        return Response(msgspec.json.encode(gateway.view.reports), media_type="application/json")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
