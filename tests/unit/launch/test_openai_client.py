"""The little OpenAI client: chunks as they come, and errors that say what to do."""

import json
import socket
from collections.abc import Callable

import httpx
import pytest

from services.core.errors import BadRequest, DiptychError, NoWorker, Overloaded, WorkerLost
from services.launch.openai_client import OpenAiClient, text_of

URL = "http://127.0.0.1:1/v1"
Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> OpenAiClient:
    return OpenAiClient(URL, transport=httpx.MockTransport(handler))


def stream(*events: str) -> Handler:
    body = "".join(f"data: {event}\n\n" for event in events)
    return lambda _request: httpx.Response(200, text=body)


def delta(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


def answer(handler: Handler) -> str:
    return "".join(text_of(chunk) for chunk in client(handler).stream_chat([], model="m"))


def test_the_text_of_all_chunks_is_the_answer() -> None:
    role = json.dumps({"choices": [{"delta": {"role": "assistant"}}]})
    usage = json.dumps({"choices": [], "usage": {}})
    assert answer(stream(role, delta("Par"), delta("is"), usage, "[DONE]")) == "Paris"


def test_comments_and_other_fields_of_the_event_stream_are_skipped() -> None:
    text = f": keepalive\n\nevent: x\ndata: {delta('a')}\n\ndata:[DONE]\n\n"
    assert answer(lambda _: httpx.Response(200, text=text)) == "a"


def test_the_request_carries_messages_and_parameters() -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, text="data: [DONE]\n\n")

    messages = [{"role": "user", "content": "hi"}]
    assert list(client(handler).stream_chat(messages, model="m", max_tokens=3)) == []
    assert bodies == [{"messages": messages, "stream": True, "model": "m", "max_tokens": 3}]


def test_the_first_served_model_is_found() -> None:
    models = {"data": [{"id": "one"}, {"id": "two"}]}
    assert client(lambda _: httpx.Response(200, json=models)).served_model() == "one"


def openai_error(status: int, message: str) -> Handler:
    return lambda _: httpx.Response(status, json={"error": {"message": message}})


FAILURES: dict[str, tuple[Handler, type[DiptychError], str]] = {
    "bad request": (openai_error(400, "temperature is too hot"), BadRequest, "400: temperature is too hot"),
    "overload": (openai_error(429, "slow down"), Overloaded, "429: slow down"),
    "no worker": (openai_error(503, "no worker"), NoWorker, "503: no worker"),
    "not our JSON": (lambda _: httpx.Response(502, text="<html>bad gateway"), NoWorker, "502: <html>bad"),
    "error in the stream": (stream('{"error": {"message": "gone"}}'), WorkerLost, "broke off: gone"),
    "cut stream": (stream(delta("a")), WorkerLost, "without"),
    "no JSON in the stream": (stream("{"), WorkerLost, "does not answer like an OpenAI API"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_answer_is_an_error_of_ours(case: str) -> None:
    handler, kind, message = FAILURES[case]
    with pytest.raises(kind, match=message):
        answer(handler)


def test_another_kind_of_server_is_recognised() -> None:
    with pytest.raises(WorkerLost, match="does not answer like an OpenAI API"):
        client(lambda _: httpx.Response(200, json={"models": []})).served_model()


def test_where_nothing_listens_the_error_says_how_to_start() -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with OpenAiClient(url) as nobody, pytest.raises(NoWorker, match="diptych up"):
            nobody.served_model()
