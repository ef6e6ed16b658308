"""The routes of the Responses API."""

from fastapi import FastAPI, Request, Response
from fastapi.params import Depends

from services.gateway.api.document import ERRORS, streamed
from services.gateway.api.exchange import Exchange
from services.gateway.api.responses_api.kept import KeptResponses
from services.gateway.api.responses_api.reply import ResponseReply
from services.gateway.api.responses_api.request import ResponsesRequest
from services.gateway.api.responses_api.response import (
    DeletedResponse,
    ResponseEvent,
    ResponseObject,
)
from services.gateway.gateway import Gateway
from services.gateway.path.record import Record


def add_responses(app: FastAPI, gateway: Gateway, key: Depends) -> None:
    """`key`: what the OpenAPI page says of API keys."""
    kept = KeptResponses(gateway.history, gateway.config.responses_bytes_max)

    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=streamed(ResponseEvent),
        dependencies=[key],
    )
    async def create(body: ResponsesRequest, http: Request) -> Response:
        """With `stream`, server-sent events with a type and a sequence number each."""
        record = Record("responses", gateway.clock, gateway.metrics, http.state.received_at)
        reply = ResponseReply(body, gateway.prompts, kept, record, http.state.request_id)
        return Exchange(gateway, reply, http)

    @app.get(
        "/v1/responses/{response_id}", response_model=ResponseObject, responses=ERRORS, dependencies=[key]
    )
    async def get(response_id: str, http: Request) -> Response:
        """An answer that was kept, of the same API key."""
        response = await kept.response(http.state.visit.tenant, response_id)
        return Response(response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}", responses=ERRORS, dependencies=[key])
    async def delete(response_id: str, http: Request) -> DeletedResponse:
        await kept.delete(http.state.visit.tenant, response_id)
        return DeletedResponse(id=response_id)
