"""What `chat`, `demo` and `explain` need of the API, over httpx: the served model, streamed answers, routes.

GET  {url}/models
POST {url}/route
POST {url}/chat/completions  with "stream": true, answered by server-sent events
"""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from services.core.errors import BadRequest, NoWorker, Overloaded, WorkerLost
from services.launch.api_key import authorization

CONNECT_TIMEOUT_SECONDS = 5.0
Message = dict[str, str]  # role and content


class OpenAiClient:
    """`url` is the API's base, such as http://127.0.0.1:8000/v1. Calls raise DiptychErrors."""

    def __init__(
        self,
        url: str,
        transport: httpx.BaseTransport | None = None,
        api_key: str | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._url = url.rstrip("/")
        loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        # An answer may take as long as it takes. A proxy from the environment cannot reach loopback.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS)
        headers = authorization(api_key)
        self._http = httpx.Client(
            timeout=timeout, trust_env=not loopback, transport=transport, headers=headers, verify=verify
        )

    def __enter__(self) -> "OpenAiClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def served_model(self) -> str:
        """The name of the first model that is served."""
        with self._errors():
            response = self._http.get(f"{self._url}/models")
            _check(response)
            return str(response.json()["data"][0]["id"])

    def route(self, body: dict[str, Any]) -> dict[str, Any]:
        """Where a request with this body would go (RouteAnswer of services/gateway/api/responses.py)."""
        with self._errors():
            response = self._http.post(f"{self._url}/route", json=body)
            _check(response)
            answer: dict[str, Any] = response.json()
            if answer["object"] != "route":
                raise KeyError("object")
            return answer

    def stream_chat(self, messages: list[Message], **parameters: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed chat completion. Closing the iterator cancels the request."""
        body = {"messages": messages, "stream": True, **parameters}
        with (
            self._errors(),
            self._http.stream("POST", f"{self._url}/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
                _check(response)
            yield from _events(response.iter_lines())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn transport errors and broken answers into errors that say what to do."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise NoWorker(
                    f"the certificate of {self._url} is not trusted ({error}); --ca FILE names the authority "
                    "that signed it"
                ) from error
            raise NoWorker(
                f"nothing answers at {self._url} ({error}); start a cluster with `diptych up`, "
                f"or pass --url http://HOST:PORT/v1"
            ) from error
        except httpx.HTTPError as error:
            raise WorkerLost(
                f"the connection to {self._url} broke: {error or type(error).__name__}"
            ) from error
        except httpx.InvalidURL as error:
            raise BadRequest(f"--url {self._url} is not a URL: {error}") from error
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise WorkerLost(f"{self._url} does not answer like an OpenAI API: {error!r}") from error


def text_of(chunk: dict[str, Any]) -> str:
    """The piece of the answer that a chunk brings; often empty."""
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise WorkerLost(f"the answer broke off: {event['error'].get('message')}")
        yield event
    raise WorkerLost("the answer broke off: the stream ended without [DONE]")


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text.strip() or response.reason_phrase
    text = f"{response.url} answered {response.status_code}: {message}"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise Overloaded(text)
    raise BadRequest(text) if response.is_client_error else NoWorker(text)
