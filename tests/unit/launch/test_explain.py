"""`diptych explain` asks a gateway where a prompt would go, and shows what it says."""

import json
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from services.launch.cli import build_parser, main
from services.launch.explain import request, summary, table


def offer(worker: str, part: str, **changes: Any) -> dict[str, Any]:
    terms = dict.fromkeys(("queue", "fetch", "prefill", "transfer", "decode", "interference"), 0.0)
    return {
        "worker": worker,
        "part": part,
        "chosen": False,
        "score": 0.0,
        "cost": 1234.5,
        **terms,
        "cached_tokens": 0,
        "fetched_tokens": 0,
        "fetched_from": None,
        **changes,
    }


ANSWER = {
    "object": "route",
    "model": "m",
    "prompt_tokens": 500,
    "expected_wait": 7.0,
    "route": {
        "policy": "cost",
        "kind": "split",
        "prefill_worker": "prefill-1",
        "decode_worker": "decode-0",
        "expected_first_token": 123.4,
        "expected_queue": 20.2,
        "cost": 150.0,
        "offers": [
            offer("prefill-1", "prefill", chosen=True, queue=20.2, prefill=63.2, fetch=40.0)
            | {"cached_tokens": 16, "fetched_tokens": 320, "fetched_from": "decode-0"},
            offer("decode-0", "decode", chosen=True, transfer=9.0, cached_tokens=336),
            offer("gpu[a]", "prefill", queue=400.0),
        ],
    },
    "cached": [
        {"worker": "prefill-1", "role": "prefill", "state": "ready", "cached_tokens": 0, "coming_tokens": 16},
        {"worker": "decode-0", "role": "decode", "state": "ready", "cached_tokens": 336, "coming_tokens": 0},
    ],
    "unpaired": {"gpu[a]": "no KV can move between it and decode-0: kv_dtype: bfloat16 != float32"},
}


def shown(route: dict[str, Any]) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(table(route))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_has_a_row_per_offer_and_no_empty_columns() -> None:
    heading, first, second, third = shown(ANSWER["route"])  # type: ignore[arg-type]
    assert heading.split() == [
        "worker",
        "part",
        "cost",
        "queue",
        "fetch",
        "prefill",
        "move",
        "cached",
        "fetched",
    ]
    assert first.split() == [
        "*",
        "prefill-1",
        "prefill",
        "1234",
        "20.2",
        "40.0",
        "63.2",
        "0.0",
        "16",
        "320",
    ]
    assert second.split()[:3] == ["*", "decode-0", "decode"]
    assert third.split()[:2] == ["gpu[a]", "prefill"], "not chosen, and its name as it is"


def test_another_policy_shows_its_scores() -> None:
    assert "score" in shown({**ANSWER["route"], "policy": "round_robin"})[0]  # type: ignore[dict-item]


def test_the_decision_is_told_in_words() -> None:
    assert summary(ANSWER).splitlines() == [
        "500 prompt tokens, policy cost: prefill-1, then decode-0",
        "first token expected in 130 ms, of it 7 ms wait in the gateway, 20 ms at the worker",
        "prefill-1 fetches 320 tokens from decode-0",
        "prefill-1 will have 16 tokens cached, which it computes now",
        "gpu[a] is in no pair: no KV can move between it and decode-0: kv_dtype: bfloat16 != float32",
    ]


@pytest.mark.parametrize(
    ("places", "words"), [((None, "d"), "d alone"), (("p", None), "p alone, for one token")]
)
def test_a_worker_alone_is_called_so(places: tuple[str | None, str | None], words: str) -> None:
    route = {**ANSWER["route"], "prefill_worker": places[0], "decode_worker": places[1]}  # type: ignore[dict-item]
    assert summary({**ANSWER, "route": route}).splitlines()[0].endswith(f": {words}")


def arguments(*flags: str) -> Namespace:
    return build_parser().parse_args(["explain", "hi", *flags])


def test_the_request_is_what_completion_or_chat_would_send() -> None:
    assert request(arguments(), "hi", "m") == {"model": "m", "prompt": "hi"}
    user = {"role": "user", "content": "hi"}
    assert request(arguments("--chat"), "hi", "m") == {"model": "m", "messages": [user]}
    system = {"role": "system", "content": "be brief"}
    flags = ("--system", "be brief", "--max-tokens", "5", "--cache-salt", "s")
    assert request(arguments(*flags), "hi", "m") == {
        "model": "m",
        "messages": [system, user],
        "max_tokens": 5,
        "cache_salt": "s",
    }


@pytest.fixture
def gateway() -> Iterator[HTTPServer]:
    """Answers every question with ANSWER, and keeps what it was asked in `asked`."""
    asked: list[tuple[str, str | None, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            self._send(ANSWER)

        def _send(self, answer: object) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_command_asks_the_gateway_and_prints(
    gateway: HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{gateway.server_port}/v1"
    assert main(["explain", "Hello", "--url", url, "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    assert "prefill-1, then decode-0" in out
    assert "gpu[a]" in out
    assert gateway.asked == [("/v1/route", "Bearer k", {"model": "m", "prompt": "Hello"})]  # type: ignore[attr-defined]


def test_json_is_what_the_gateway_says(gateway: HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "Hello", "--url", f"http://127.0.0.1:{gateway.server_port}/v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWER


def test_an_absent_gateway_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "Hello", "--url", "http://127.0.0.1:1/v1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diptych: ")
