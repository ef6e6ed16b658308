"""The OpenAPI document, where FastAPI cannot see the whole truth: errors and streams.

A new route gives its errors by `responses=ERRORS`, a streamed one its chunks by `streamed(Chunk)`.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.api.responses import ChatCompletionChunk, Completion, ErrorBody
from services.gateway.api.responses_api.response import ResponseEvent

_RETRY_AFTER = {"description": "seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
_ERRORS: dict[int, str] = {
    400: "The body is no JSON, or a parameter is wrong or not supported: `param` names it",
    401: "The API key is missing or unknown",
    404: "No such model or object",
    408: "The request took too long to arrive",
    413: "The body is too large",
    429: "No room now, or a limit of the API key is reached",
    431: "The headers are too large",
    500: "A fault of the server",
    503: "No worker can take the request now",
    504: "The request's time is over",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()
}
ERRORS[429]["headers"] = {"Retry-After": _RETRY_AFTER}
_CHUNKS = (ChatCompletionChunk, Completion, ResponseEvent)
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")  # with its 422; ours are 400


def streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that answers with server-sent events of `chunk` objects, where asked to."""
    contents = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (chunk, ErrorBody)]
    json_data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": contents},
    }
    data = {"anyOf": [{"const": "[DONE]"}, json_data]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"schema": event}}}, **ERRORS}


class DocumentedApp(FastAPI):
    keys_optional = True

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _correct(super().openapi(), self.keys_optional)
        return super().openapi()


def _correct(document: dict[str, Any], keys_optional: bool) -> None:
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keys_optional and "security" in operation:
                operation["security"].append({})  # none at all will do
    schemas = document["components"]["schemas"]
    for name in _FASTAPIS_OWN:
        schemas.pop(name, None)
    _, chunks = models_json_schema(
        [(chunk, "serialization") for chunk in _CHUNKS], ref_template="#/components/schemas/{model}"
    )
    document["components"]["schemas"] = chunks["$defs"] | schemas
