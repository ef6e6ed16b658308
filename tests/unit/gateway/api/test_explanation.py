"""Where requests go, explained: before they come, and with their answers."""

import asyncio
import json

import pytest

from services.core.errors import EngineFailed, Overloaded
from services.gateway.path.journal import ROUTES_KEPT
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import MODEL, InMemoryCluster, until
from tests.unit.gateway.scripted_worker_server import report

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
PROMPT = {"model": MODEL, "prompt": [n % 900 + 100 for n in range(400)], "max_tokens": 4}
TERMS = ("queue", "fetch", "prefill", "transfer", "decode", "interference")


@pytest.fixture
def network() -> bool:
    return False


async def explain(cluster: InMemoryCluster, body: dict) -> dict:
    response = await cluster.http.post("/v1/route", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def routes(cluster: InMemoryCluster, body: dict) -> list[dict]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = await cluster.http.post(path, json={**body, "explain": True})
    assert response.status_code == 200, response.text
    return response.json()["routes"]


@pytest.mark.parametrize("body", [CHAT, PROMPT], ids=["chat", "completion"])
async def test_a_route_that_is_asked_for_is_the_one_that_a_request_takes(start_cluster, body) -> None:
    one_of_each = [report("p", "prefill", queued_prefill_tokens=70), report("d", "decode", running=3)]
    cluster = await start_cluster(reports=one_of_each)
    explained = await explain(cluster, body)
    assert await routes(cluster, body) == [explained["route"]]
    route = explained["route"]
    assert (route["kind"], route["prefill_worker"], route["decode_worker"]) == ("split", "p", "d")
    assert route["expected_queue"] == route["offers"][0]["queue"] > 0
    assert route["expected_first_token"] == pytest.approx(
        sum(route["offers"][0][term] for term in ("queue", "fetch", "prefill")), abs=0.01
    )


async def test_offers_are_those_of_all_workers_and_their_terms_add_up(cluster) -> None:
    offers = (await explain(cluster, PROMPT))["route"]["offers"]
    assert {(offer["worker"], offer["part"]) for offer in offers} == {
        *((worker, "prefill") for worker in ("p1", "p2")),
        *((worker, "decode") for worker in ("d1", "d2")),
    }
    assert [offer["chosen"] for offer in offers] == [True, True, False, False]
    for offer in offers:
        assert offer["cost"] == pytest.approx(sum(offer[term] for term in TERMS), abs=0.01)


async def test_what_caches_hold_is_told_for_every_worker(cluster) -> None:
    await routes(cluster, PROMPT)
    explained = await explain(cluster, PROMPT)
    cached = {worker["worker"]: worker["cached_tokens"] for worker in explained["cached"]}
    assert sorted(cached.values()) == [0, 0, 400, 400]
    chosen = explained["route"]
    assert cached[chosen["prefill_worker"]] == cached[chosen["decode_worker"]] == 400
    assert explained["prompt_tokens"] == 400


async def test_asking_computes_counts_and_reserves_nothing(cluster) -> None:
    before = cluster.gateway.view.worker_views()
    for body in (CHAT, PROMPT):
        await explain(cluster, body)
    assert cluster.workers.calls == []
    assert cluster.gateway.view.worker_views() == before
    located = await cluster.gateway.view.locate(PROMPT["prompt"], "")
    assert (set(located.cached.values()), located.coming) == ({0}, {})
    assert "requests_total{" not in (await cluster.http.get("/metrics")).text


async def test_who_waits_already_is_told_of(start_cluster) -> None:
    full = [report("p", "prefill", blocks_free=0), report("d", "decode", blocks_free=0)]
    cluster = await start_cluster(reports=full, admission_timeout_s=60.0)
    assert (await explain(cluster, PROMPT))["expected_wait"] == 0.0
    asking = asyncio.create_task(cluster.http.post("/v1/completions", json=PROMPT))
    await until(lambda: len(cluster.gateway.queue))
    assert (await explain(cluster, PROMPT))["expected_wait"] > 0.0
    assert len(cluster.gateway.queue) == 1
    asking.cancel()
    await until(lambda: not len(cluster.gateway.queue))


async def test_round_robin_is_not_moved_on_by_asking(start_cluster) -> None:
    cluster = await start_cluster(policy="round_robin")
    asked = [(await explain(cluster, PROMPT))["route"]["prefill_worker"] for _ in range(3)]
    assert asked == ["p1"] * 3
    taken = [(await routes(cluster, PROMPT))[0]["prefill_worker"] for _ in range(3)]
    assert taken == ["p1", "p2", "p1"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**CHAT, "messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ({**CHAT, "temperature": 9}, "temperature"),
        ({**PROMPT, "prompt": [-1]}, "prompt[0]"),
        ({"model": MODEL}, "prompt"),
        ({**PROMPT, "max_tokens": 10_000}, "max_tokens"),
        ({**PROMPT, "tools": [{"a": 1}]}, "tools"),
    ],
)
async def test_a_bad_request_names_its_parameter(cluster, body, param) -> None:
    response = await cluster.http.post("/v1/route", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_body_that_is_no_object_is_refused_in_words(cluster) -> None:
    response = await cluster.http.post("/v1/route", json=[1])
    assert (response.status_code, response.json()["error"]["param"]) == (400, None)


async def test_a_route_is_explained_for_one_prompt(cluster) -> None:
    response = await cluster.http.post("/v1/route", json={**PROMPT, "prompt": ["one", "two"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_without_a_worker_that_could_take_it_there_is_no_route(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("p", "prefill")])
    response = await cluster.http.post("/v1/route", json=PROMPT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")


async def test_every_attempt_is_explained(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "prefill", Fault(EngineFailed("broken")))
    first, second = await routes(cluster, PROMPT)
    assert first["prefill_worker"] != second["prefill_worker"]


async def test_of_very_many_attempts_the_last_ones_are_explained(start_cluster) -> None:
    cluster = await start_cluster(admission_timeout_s=10.0)
    cluster.workers.script(ANY_WORKER, "prefill", *[Fault(Overloaded("full"))] * 20)
    assert len(await routes(cluster, PROMPT)) == ROUTES_KEPT


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_explains_in_its_last_chunk(cluster, include_usage) -> None:
    body = {**PROMPT, "stream": True, "explain": True, "stream_options": {"include_usage": include_usage}}
    text = (await cluster.http.post("/v1/completions", json=body)).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert ["routes" in event for event in events] == [False] * (len(events) - 1) + [True]


async def test_nobody_gets_an_explanation_without_asking(cluster) -> None:
    response = await cluster.http.post("/v1/completions", json=PROMPT)
    assert "routes" not in response.json()


async def test_the_openapi_page_describes_routes_and_keys(cluster) -> None:
    page = (await cluster.http.get("/openapi.json")).json()
    operation = page["paths"]["/v1/route"]["post"]
    names = {"ExplainedRoute", "ExplainedOffer", "RouteAnswer", "CachedOn", "ErrorBody"}
    assert names <= set(page["components"]["schemas"])
    assert "explain" in page["components"]["schemas"]["CompletionRequest"]["properties"]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/RouteAnswer"
    }
    assert page["components"]["securitySchemes"]["API key"]["scheme"] == "bearer"
    assert operation["security"] == [{"API key": []}, {}], "a key, or none"


async def test_an_explanation_takes_a_requests_slot(start_cluster) -> None:
    cluster = await start_cluster(inflight_max=0)
    assert (await cluster.http.post("/v1/route", json=PROMPT)).status_code == 429
