"""`return_token_ids`: what a client gets is exactly what the workers sampled."""

import json

import pytest

from tests.unit.gateway.in_memory_cluster import MODEL

BODY = {"model": MODEL, "return_token_ids": True, "max_tokens": 100}
REQUESTS = {
    "/v1/completions": BODY | {"prompt": "France"},
    "/v1/chat/completions": BODY | {"messages": [{"role": "user", "content": "France?"}]},
}


@pytest.fixture
def network() -> bool:
    return False


def chunks_of(stream: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_whole_answer_carries_all_its_token_ids(cluster, path: str) -> None:
    answer = (await cluster.http.post(path, json=REQUESTS[path])).json()
    assert answer["choices"][0]["token_ids"] == cluster.answer_ids


@pytest.mark.parametrize("path", REQUESTS)
async def test_the_chunks_of_a_stream_carry_each_token_id_once_also_while_text_is_held(
    cluster, path: str
) -> None:
    held = {"stop": ["says so, but not this"], "stream": True}
    chunks = chunks_of((await cluster.http.post(path, json=REQUESTS[path] | held)).text)
    received = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert received == cluster.answer_ids


async def test_token_ids_are_not_sent_unasked(cluster) -> None:
    for path, body in REQUESTS.items():
        for stream in (False, True):
            body = body | {"return_token_ids": None, "stream": stream}
            assert "token_ids" not in (await cluster.http.post(path, json=body)).text
