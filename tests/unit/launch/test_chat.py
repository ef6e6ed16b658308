"""A conversation: answers are printed as they stream and remembered for the next question."""

import json

import httpx
import pytest

from services.core.errors import WorkerLost
from services.launch.chat import Conversation
from services.launch.openai_client import OpenAiClient


class EchoServer:
    """Answers each question with its last message in capitals; remembers what it was sent."""

    def __init__(self) -> None:
        self.requests: list[list[dict[str, str]]] = []
        self.cut = False  # end streams without [DONE]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        messages = json.loads(request.content)["messages"]
        self.requests.append(messages)
        chunk = json.dumps({"choices": [{"delta": {"content": messages[-1]["content"].upper()}}]})
        return httpx.Response(200, text=f"data: {chunk}\n\n" + ("" if self.cut else "data: [DONE]\n\n"))


@pytest.fixture
def server() -> EchoServer:
    return EchoServer()


def conversation(server: EchoServer, system: str | None = None) -> Conversation:
    client = OpenAiClient("http://127.0.0.1:1/v1", transport=httpx.MockTransport(server))
    return Conversation(client, {"model": "m"}, system)


def test_answers_are_printed_and_remembered(server: EchoServer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(server, system="be loud")
    talk.ask("hello")
    talk.ask("again")
    assert capsys.readouterr().out == "HELLO\nAGAIN\n"
    assert [message["content"] for message in server.requests[-1]] == ["be loud", "hello", "HELLO", "again"]
    assert [message["role"] for message in server.requests[-1]] == ["system", "user", "assistant", "user"]


def test_a_turn_that_broke_off_is_not_remembered(
    server: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(server)
    server.cut = True
    with pytest.raises(WorkerLost):
        talk.ask("lost")
    server.cut = False
    talk.ask("next")
    assert [message["content"] for message in server.requests[-1]] == ["next"]
    assert capsys.readouterr().out == "LOST\nNEXT\n"
