"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}, for everything."""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from services.core.errors import (
    BadRequest,
    DiptychError,
    InvalidKey,
    NoWorker,
    Overloaded,
    RateLimited,
    UnknownModel,
    facts,
)
from services.gateway.api.responses import ErrorBody, ErrorDetails
from services.gateway.metrics import GatewayMetrics

_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
Text = TypeVar("Text", str, str | None)
_QUOTED_MAX = 1000
# FastAPI's own: what JSON's parser fails at, rather than says no to.
_MESSAGES = {
    "There was an error parsing the body": "The body cannot be read as JSON: it must be UTF-8, as it is (not "
    "compressed), and neither nested very deeply nor with numbers of thousands of digits."
}
INTERNAL = "The server failed to answer this request. It is not the request's fault; see the server's log."


def install_error_handlers(app: FastAPI, metrics: GatewayMetrics, endpoints: dict[str, str]) -> None:
    """`endpoints` maps paths to the names under which rejected requests are counted."""

    async def on_diptych_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, DiptychError)
        return diptych_error_response(error)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if request.url.path in endpoints:
            metrics.requests.labels(endpoints[request.url.path], facts(BadRequest("")).label).inc()
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]  # all in the body
        return error_response(400, error_body(first_problem(problems, error.body)))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = _MESSAGES.get(error.detail, f"{error.detail}: {request.method} {request.url.path}")
        headers = {**(error.headers or {}), **_allowed(request, error.status_code)}
        return error_response(error.status_code, _body(message, error.status_code), headers)

    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(500, _body(INTERNAL, 500))

    app.add_exception_handler(DiptychError, on_diptych_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _allowed(request: Request, status: int) -> dict[str, str]:
    """The methods of a path, of which the framework names those of the first route only."""
    if status != 405:
        return {}
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return {"Allow": ", ".join(sorted(methods))}


def error_body(error: DiptychError) -> ErrorBody:
    status = facts(error).http_status
    if isinstance(error, UnknownModel):
        return _body(error.message, status, error.param, "model_not_found")
    if isinstance(error, RateLimited):
        return _rate_limit_body(error)
    code = error.code if isinstance(error, BadRequest) else facts(error).label
    return _body(error.message, status, error.param, code)


def internal_error_body() -> ErrorBody:
    return _body(INTERNAL, 500)


def diptych_error_response(error: DiptychError) -> Response:
    return error_response(facts(error).http_status, error_body(error), _headers(error))


def error_response(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> Response:
    # ASCII, because a message may quote a client's text, which need not be valid Unicode.
    content = json.dumps(body.model_dump())
    return Response(content, status, headers, media_type="application/json")


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> ErrorBody:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorBody(error=ErrorDetails(message=_cut(message), type=kind, param=_cut(param), code=code))


def _cut(text: Text) -> Text:
    """It may quote what the client sent, which has megabytes at worst."""
    if text is None or len(text) <= _QUOTED_MAX:
        return text
    return f"{text[:_QUOTED_MAX]}..."


def _rate_limit_body(error: RateLimited) -> ErrorBody:
    """OpenAI's type says what there was too much of: requests or tokens."""
    kind = "tokens" if error.limit == "tokens" else "requests"
    return ErrorBody(
        error=ErrorDetails(message=error.message, type=kind, param=None, code=facts(error).label)
    )


def _headers(error: DiptychError) -> dict[str, str]:
    if isinstance(error, InvalidKey):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, RateLimited):  # OpenAI's clients wait for the milliseconds, others for the seconds
        milliseconds = math.ceil(error.retry_after_s * 1e3)
        return {"Retry-After": str(math.ceil(error.retry_after_s)), "Retry-After-Ms": str(milliseconds)}
    if isinstance(error, Overloaded | NoWorker):
        return {"Retry-After": str(math.ceil(error.retry_after_s))}
    return {}


def first_problem(problems: Sequence[Any], body: object) -> BadRequest:
    """The first problem, of those that pydantic found, of a body that does not fit its schema; in words."""
    if problems[0]["type"] == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", problems[0]["msg"])
        return BadRequest(f"The body is not valid JSON: {reason}.")
    # Of a field that may have one of several types, the problem found deepest is the one that was meant; of
    # some that are equally deep one of a value that has the right type.
    of_first_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    paths = [_path(problem, body) for problem in of_first_field]
    path, problem = max(zip(paths, of_first_field, strict=True), key=_likely_meant)
    if not path:
        return BadRequest("The body must be a JSON object, sent with Content-Type: application/json.")
    param = _as_param(path)
    return BadRequest(f"{param}: {problem['msg']}", param)


def _likely_meant(located: tuple[list[str | int], Any]) -> tuple[int, bool]:
    path, problem = located
    return len(path), not problem["type"].endswith("_type")


def _path(problem: Any, body: object) -> list[str | int]:
    """The keys and indices that lead to the problem in the body.

    Pydantic's location also names the alternatives of a union; they are not in the body and left out.
    """
    path: list[str | int] = []
    for depth, key in enumerate(problem["loc"], start=1):
        if isinstance(key, str) and key.startswith("("):  # the tag of an alternative; no field is named so
            continue
        if isinstance(key, int) and isinstance(body, list):
            path.append(key)
            body = body[key] if key < len(body) else None
        elif isinstance(key, str) and isinstance(body, dict):
            missing = problem["type"] == "missing" and depth == len(problem["loc"])
            if key in body or missing:
                path.append(key)
                body = body.get(key)
    return path


def _as_param(path: Sequence[str | int]) -> str:
    """As OpenAI writes paths, like messages[0].content."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
