"""What is wrong with a request is said with status 400, in OpenAI's error body, naming the parameter."""

import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

PROMPT = "Once upon a time"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
BAD_INPUT = {
    "unknown model": (COMPLETION | {"model": "gpt-4o"}, 404, "model"),
    "no prompt": ({"model": MODEL}, 400, "prompt"),
    "empty prompt": (COMPLETION | {"prompt": ""}, 400, "prompt"),
    "no token ids": (COMPLETION | {"prompt": []}, 400, "prompt"),
    "a token id outside the vocabulary": (COMPLETION | {"prompt": [10**6]}, 400, "prompt"),
    "a prompt of the wrong type": (COMPLETION | {"prompt": 7}, 400, "prompt"),
    "a prompt longer than the context": (COMPLETION | {"prompt": [100] * 8192}, 400, "prompt"),
    "more tokens than the context": (COMPLETION | {"max_tokens": 9000}, 400, "max_tokens"),
    "no tokens": (COMPLETION | {"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens as text": (COMPLETION | {"max_tokens": "many"}, 400, "max_tokens"),
    "negative temperature": (COMPLETION | {"temperature": -0.1}, 400, "temperature"),
    "top_p above 1": (COMPLETION | {"top_p": 1.5}, 400, "top_p"),
    "no choice": (COMPLETION | {"n": 0}, 400, "n"),
    "too many choices": (COMPLETION | {"n": 1000}, 400, "n"),
    "an empty stop string": (COMPLETION | {"stop": [""]}, 400, "stop[0]"),
    "usage options without a stream": (
        COMPLETION | {"stream_options": {"include_usage": True}},
        400,
        "stream_options",
    ),
    "min_tokens above max_tokens": (COMPLETION | {"min_tokens": 5}, 400, "min_tokens"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
async def test_it_is_refused_with_the_parameters_name(split: RunningCluster, case: str) -> None:
    body, status, param = BAD_INPUT[case]
    async with split.http() as http:
        response = await http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"]


async def test_a_body_that_is_no_json_is_a_400(split: RunningCluster) -> None:
    async with split.http() as http:
        response = await http.post(
            "/v1/completions", content='{"model": ', headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


async def test_no_refused_request_reached_a_worker(split: RunningCluster) -> None:
    before = await split.worker_metrics()
    async with split.http() as http:
        for body, _, _ in BAD_INPUT.values():
            await http.post("/v1/completions", json=body)
    after = await split.worker_metrics()
    for worker, seen in after.items():
        admitted = "diptych_worker_prompt_tokens_total"
        assert seen.value(admitted) == before[worker].value(admitted)
