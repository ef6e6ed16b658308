"""However clients ask for a form, both workers get one grammar; and the token that completes it is shown."""

import json

import pytest

from services.core.errors import Unanswerable
from services.gateway.workers.memory_worker_client import Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 30}
SCHEMA = {"type": "object", "properties": {"format": {"type": "integer"}}}
OPTIONS = {"coerce_one_of": True, "whitespace_pattern": r"[ \t\n\r]{0,40}"}


@pytest.fixture
def network() -> bool:
    return False


async def grammar_of(cluster, **fields) -> object:
    """Of the workers of one request; a schema as an object."""
    before = len(cluster.workers.calls)
    response = await cluster.http.post("/v1/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    calls = cluster.workers.calls[before:]
    assert {call.kind for call in calls} == {"prefill", "decode"}
    (grammar,) = {call.sequence.sampling.grammar for call in calls}
    return json.loads(grammar)["grammars"][0] if grammar.startswith("{") else grammar


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
            }
        },
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=str,
)
async def test_a_schema_can_be_given_in_many_ways(cluster, fields) -> None:
    assert await grammar_of(cluster, **fields) == {"json_schema": {**SCHEMA, "x-guidance": OPTIONS}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"guided_json_object": True},
        {"structured_outputs": {"json_object": True}},
    ],
    ids=str,
)
async def test_any_object_can_be_asked_for(cluster, fields) -> None:
    assert await grammar_of(cluster, **fields) == {"json_schema": {"type": "object", "x-guidance": OPTIONS}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"guided_regex": "a/b"}, {"lark_grammar": "start: /a\\/b/"}),
        ({"structured_outputs": {"regex": "a"}}, {"lark_grammar": "start: /a/"}),
        ({"guided_choice": ["yes", 'n"o']}, 'start: "yes" | "n\\"o"'),
        ({"structured_outputs": {"choice": ["yes"]}}, 'start: "yes"'),
        ({"guided_grammar": 'start: "a"'}, 'start: "a"'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, '%llguidance {}\n\nstart: "a"\n'),
        ({"response_format": {"type": "text"}, "guided_json_object": False, "guided_json": None}, ""),
        ({"structured_outputs": {"json_object": False}}, ""),
    ],
    ids=str,
)
async def test_other_forms(cluster, fields, grammar) -> None:
    assert await grammar_of(cluster, **fields) == grammar


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, " ?"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, ""),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": ""}}, ""),
    ],
    ids=str,
)
async def test_white_space_can_be_chosen(cluster, fields, pattern: str) -> None:
    grammar = await grammar_of(cluster, **fields)
    assert grammar["json_schema"]["x-guidance"]["whitespace_pattern"] == pattern


async def test_the_token_that_completes_a_grammar_is_shown_and_an_end_token_is_not(cluster) -> None:
    assert cluster.answer_ids[-1] in cluster.gateway.model.tokenizer.end_token_ids
    last = cluster.answer_ids[-2]
    for answer_ids, stop_ids, shown in [
        (cluster.answer_ids, [], ANSWER),
        (cluster.answer_ids[:-1], [], ANSWER),
        (cluster.answer_ids[:-1], [last], ANSWER.removesuffix(".")),
    ]:
        cluster.answer_ids = answer_ids
        body = BODY | {"guided_regex": ".*", "stop_token_ids": stop_ids, "logprobs": 1}
        choice = (await cluster.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (shown, "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_has_no_next_token_ends_with_an_error_at_once(cluster, stream: bool) -> None:
    for worker in ("d1", "d2"):
        cluster.workers.script(worker, "decode", Fault(Unanswerable("nothing is left"), after_tokens=2))
    response = await cluster.http.post(
        "/v1/completions", json=BODY | {"guided_regex": ".*", "stream": stream}
    )
    assert response.status_code == (200 if stream else 400)
    assert '"unanswerable"' in response.text
    assert "nothing is left" in response.text
    assert "[DONE]" not in response.text
    assert len(cluster.workers.calls) == 2
