"""With keys configured nobody comes in without one, and nobody takes more than theirs allows."""

import asyncio
from datetime import UTC, datetime, timedelta

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from services.core.clock import ManualClock, SystemClock
from services.core.errors import InvalidKey
from services.gateway.api.body import Bodies
from services.gateway.api.edge import Edge
from services.gateway.door.door import OPEN_PATHS, LockedDoor, Locks
from services.gateway.key_metrics import KEY_NAMES_MAX, OTHER_KEYS
from services.gateway.metrics import GatewayMetrics
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from services.keys import changes
from services.keys.api_key import KeyLimits, new_key
from services.keys.memory_keys import MemoryKeys
from services.keys.memory_limits import MemoryLimits
from services.keys.protocol import LEASE_S
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL, until

PROMPT = [n % 900 + 100 for n in range(40)]
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100}


@pytest.fixture
def network() -> bool:
    return False


class Keys:
    """A store with keys, what a test may do to it, and what they used."""

    def __init__(self) -> None:
        self.store = MemoryKeys()
        self.time = ManualClock(1e6)  # of the limits
        self.limits = MemoryLimits(self.time)

    @property
    def locks(self) -> Locks:
        return Locks(self.store, self.limits)

    async def create(self, name: str = "alice", *, now: datetime | None = None, **fields) -> str:
        """A header with the new key."""
        limits = KeyLimits(**{n: fields.pop(n) for n in KeyLimits.__struct_fields__ if n in fields})
        now = now or datetime.now(UTC)
        return bearer((await changes.create(self.store, name, now, limits=limits, **fields))[1])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys() -> Keys:
    return Keys()


async def complete(cluster, headers=None, **body):
    return await cluster.http.post("/v1/completions", json=BODY | body, headers=headers)


def error_of(response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error["message"]
    assert error["param"] is None
    return response.status_code, error["type"], error["code"]


REFUSED = (401, "invalid_request_error", "invalid_api_key")


async def test_a_key_opens_and_nothing_else_does(start_cluster, keys) -> None:
    good = await keys.create()
    cluster = await start_cluster(locks=keys.locks)
    assert (await complete(cluster, good)).json()["choices"][0]["text"] == ANSWER
    key = good["Authorization"].removeprefix("Bearer ")
    wrong = [
        None,
        bearer(new_key("0f3a9c1b2d4e")),
        bearer(new_key(key[3:15])),
        bearer(key[:-1]),
        bearer(key + "A"),
        bearer(key.upper()),
        bearer("sk-"),
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"Authorization": f"Bearer {key} {key}"},
        {"X-API-Key": key},
    ]
    for headers in wrong:
        refused = await complete(cluster, headers)
        assert error_of(refused) == REFUSED
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert key not in refused.text
    assert cluster.metric("unauthorized_total") == len(wrong)


async def test_two_keys_in_one_request_are_refused(start_cluster, keys) -> None:
    good = await keys.create()
    cluster = await start_cluster(locks=keys.locks)
    both = [("Authorization", good["Authorization"]), ("Authorization", "Bearer other")]
    assert (await cluster.http.get("/v1/models", headers=both)).status_code == 401


async def test_every_route_wants_a_key_but_those_of_machines_and_documents(start_cluster, keys) -> None:
    headers = await keys.create(admin=True)
    cluster = await start_cluster(locks=keys.locks)
    documented = (await cluster.http.get("/openapi.json")).json()["paths"]
    paths = {*documented, *OPEN_PATHS, "/v1/cluster", "/nothing", "/health/", "//v1/models"}
    named = {path: path.format(model_id=MODEL, response_id="resp_1") for path in paths}
    asked = {path: (await cluster.http.get(url)).status_code for path, url in named.items()}
    assert {path for path, status in asked.items() if status != 401} == set(OPEN_PATHS)
    assert (await cluster.http.get("/v1/models", headers=headers)).status_code == 200
    assert (await cluster.http.get("/v1/cluster", headers=headers)).status_code == 200


async def test_what_the_cluster_looks_like_is_for_administrators(start_cluster, keys) -> None:
    headers = await keys.create()
    cluster = await start_cluster(locks=keys.locks)
    refused = await cluster.http.get("/v1/cluster", headers=headers)
    assert error_of(refused) == (403, "invalid_request_error", "not_allowed")


async def test_a_body_without_a_key_is_never_read(keys) -> None:
    async def app(scope, receive, send):
        raise AssertionError("it came in")

    async def receive():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    door = LockedDoor(keys.store, keys.limits, GatewayMetrics(), SystemClock())
    await door.open()
    edge = Edge(app, SystemClock(), door, Bodies(1 << 20, 1 << 20))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await edge(scope, receive, send)
    assert sent[0]["status"] == 401


@given(
    st.binary(max_size=90), st.sampled_from([b"", b"Bearer ", b"bearer\t", b"Bearer sk-", b"Bearer sk-0f3a"])
)
def test_no_header_breaks_the_door(junk, prefix) -> None:
    async def ask() -> None:
        keys = Keys()
        await keys.create()
        door = LockedDoor(keys.store, keys.limits, GatewayMetrics(), SystemClock())
        await door.open()
        with pytest.raises(InvalidKey):
            door.visit("POST", "/v1/completions", Headers(raw=[(b"authorization", prefix + junk)]), "r")

    asyncio.run(ask())


async def test_a_revoked_key_is_refused_at_once_and_what_runs_with_it_ends_well(start_cluster, keys) -> None:
    headers, pause = await keys.create(), Fault(after_tokens=3)
    cluster = await start_cluster(locks=keys.locks)
    cluster.workers.script(ANY_WORKER, "decode", pause)
    running = asyncio.create_task(complete(cluster, headers))
    await until(lambda: any(call.kind == "decode" for call in cluster.workers.running))
    await changes.revoke(keys.store, "alice", datetime.now(UTC))
    await cluster.gateway.door.ring.refresh()
    refused = await complete(cluster, headers)
    assert error_of(refused) == REFUSED
    assert "revoked" in refused.json()["error"]["message"]
    pause.end.set()
    assert (await running).json()["choices"][0]["text"] == ANSWER


async def test_an_expired_key_is_refused(start_cluster, keys) -> None:
    past = datetime.now(UTC) - timedelta(days=2)
    headers = await keys.create(now=past, expires=past + timedelta(days=1))
    refused = await complete(await start_cluster(locks=keys.locks), headers)
    assert error_of(refused) == REFUSED
    assert "expired" in refused.json()["error"]["message"]


async def test_a_new_key_counts_without_a_restart_and_a_rotated_one_keeps_its_cache(
    start_cluster, keys
) -> None:
    cluster = await start_cluster(locks=keys.locks)
    headers = await keys.create()
    async with asyncio.timeout(10):
        while (await complete(cluster, headers)).status_code == 401:
            await asyncio.sleep(0.02)
    fresh = bearer((await changes.rotate(keys.store, "alice", datetime.now(UTC)))[1])
    await cluster.gateway.door.ring.refresh()
    assert (await complete(cluster, headers)).status_code == 401
    assert (await complete(cluster, fresh)).status_code == 200
    assert len({call.sequence.salt for call in cluster.workers.calls}) == 1


async def test_while_keys_were_never_read_nobody_is_told_that_theirs_is_wrong(start_cluster, keys) -> None:
    headers = await keys.create()
    keys.store.available = False
    cluster = await start_cluster(locks=keys.locks)
    assert error_of(await complete(cluster, headers))[0] == 503
    assert (await cluster.http.get("/health/ready")).status_code == 503
    keys.store.available = True
    await cluster.gateway.door.ring.refresh()
    assert (await complete(cluster, headers)).status_code == 200
    assert (await cluster.http.get("/health/ready")).status_code == 200


async def test_salts_and_tenants_are_those_of_records_and_no_function_of_the_key(start_cluster, keys) -> None:
    headers = await keys.create()
    cluster = await start_cluster(locks=keys.locks)
    await complete(cluster, headers)
    record = (await keys.store.read()).keys[0]
    unlocked = await start_cluster()
    await complete(unlocked, headers)
    (salt,) = {call.sequence.salt for call in cluster.workers.calls}
    (other,) = {call.sequence.salt for call in unlocked.workers.calls}
    assert salt not in (other, record.salt, "")
    assert record.salt not in repr(cluster.gateway.door.ring.tenant_of(headers["Authorization"][7:].encode()))


@pytest.mark.parametrize(
    ("priority", "asked", "got"),
    [
        ("normal", {}, "normal"),
        ("normal", {"priority": -5}, "normal"),
        ("normal", {"priority": 5}, "low"),
        ("high", {}, "high"),
        ("high", {"priority": 0}, "normal"),
        ("high", {"service_tier": "flex"}, "low"),
        ("low", {}, "low"),
        ("low", {"service_tier": "priority"}, "low"),
    ],
)
async def test_a_key_bounds_the_priority_of_its_requests(start_cluster, keys, priority, asked, got) -> None:
    headers = await keys.create(priority=priority)
    cluster = await start_cluster(locks=keys.locks)
    assert (await complete(cluster, headers, **asked)).status_code == 200
    assert cluster.metric("queue_seconds_count", priority=got) == 1


class TestLimits:
    async def test_requests_above_the_limit_get_429_in_openai_s_words(self, start_cluster, keys) -> None:
        headers = await keys.create(requests_per_minute=2)
        cluster = await start_cluster(locks=keys.locks)
        answers = [await complete(cluster, headers) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert error_of(answers[2]) == (429, "requests", "rate_limit_exceeded")
        assert answers[2].headers["Retry-After"] == "30"
        assert int(answers[2].headers["Retry-After-Ms"]) == 30_000
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["1", "0", "0"]
        keys.time.advance(30)
        assert (await complete(cluster, headers)).status_code == 200
        assert cluster.metric("key_rejections_total", key="alice", limit="requests") == 1

    async def test_every_route_that_computes_counts(self, start_cluster, keys) -> None:
        headers = await keys.create(requests_per_minute=1)
        cluster = await start_cluster(locks=keys.locks)
        assert (await cluster.http.post("/v1/route", json=BODY, headers=headers)).status_code == 200
        assert (await cluster.http.get("/v1/models", headers=headers)).status_code == 200
        assert (await complete(cluster, headers)).status_code == 429

    async def test_prompts_count_before_any_work_and_answers_when_they_come(
        self, start_cluster, keys
    ) -> None:
        headers = await keys.create(tokens_per_minute=100)
        cluster = await start_cluster(locks=keys.locks)
        first = await complete(cluster, headers)
        used = first.json()["usage"]["total_tokens"]
        assert len(PROMPT) < used < 60
        await cluster.gateway.door.visits.settle_ended()
        second = await complete(cluster, headers)
        assert second.status_code == 200
        assert second.headers["x-ratelimit-remaining-tokens"] == str(100 - used - len(PROMPT))
        calls = len(cluster.workers.calls)
        await cluster.gateway.door.visits.settle_ended()
        third = await complete(cluster, headers)
        assert error_of(third) == (429, "tokens", "rate_limit_exceeded")
        assert len(cluster.workers.calls) == calls
        # At the door nobody knows yet how long the prompt is: what comes after the debt is paid may not fit.
        waited = 0
        while (answer := await complete(cluster, headers)).status_code == 429:
            waited += int(answer.headers["Retry-After"])
            keys.time.advance(int(answer.headers["Retry-After"]))
        assert 0 < waited <= 60

    async def test_all_prompts_of_a_request_and_all_its_choices_count(self, start_cluster, keys) -> None:
        headers = await keys.create(tokens_per_minute=10_000)
        cluster = await start_cluster(locks=keys.locks)
        answer = await complete(cluster, headers, prompt=[PROMPT, PROMPT[:20]], n=2, max_tokens=5)
        usage = answer.json()["usage"]
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(10_000 - usage["prompt_tokens"])
        await cluster.gateway.door.visits.settle_ended()
        assert cluster.metric("key_prompt_tokens_total", key="alice") == usage["prompt_tokens"] == 60
        assert cluster.metric("key_completion_tokens_total", key="alice") == usage["completion_tokens"] == 20
        answer = await complete(cluster, headers, prompt=PROMPT)
        left = 10_000 - usage["total_tokens"] - len(PROMPT)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(left)

    async def test_a_long_answer_is_counted_while_it_comes(self, start_cluster, keys) -> None:
        headers, pause = await keys.create(tokens_per_minute=1000), Fault(after_tokens=4)
        cluster = await start_cluster(locks=keys.locks)
        cluster.workers.script(ANY_WORKER, "decode", pause)
        running = asyncio.create_task(complete(cluster, headers))
        await until(lambda: cluster.metric("completion_tokens_total") == 5)
        await cluster.gateway.door.visits.settle_running()
        assert cluster.metric("key_completion_tokens_total", key="alice") == 5
        pause.end.set()
        whole = (await running).json()["usage"]["completion_tokens"]
        await until(lambda: cluster.metric("key_completion_tokens_total", key="alice") == whole)

    async def test_so_many_run_at_once_at_all_gateways_together(self, start_cluster, keys) -> None:
        headers, pause = await keys.create(concurrent=1), Fault(after_tokens=1)
        one, other = [await start_cluster(locks=keys.locks) for _ in range(2)]
        one.workers.script(ANY_WORKER, "decode", pause)
        running = asyncio.create_task(complete(one, headers))
        await until(lambda: one.workers.running)
        for cluster in (one, other):
            assert error_of(await complete(cluster, headers)) == (429, "requests", "rate_limit_exceeded")
        pause.end.set()
        assert (await running).status_code == 200
        await one.gateway.door.visits.settle_ended()
        assert (await complete(other, headers)).status_code == 200

    async def test_a_client_that_goes_gives_its_place_back(self, start_cluster, keys) -> None:
        headers = await keys.create(concurrent=1)
        cluster = await start_cluster(locks=keys.locks)
        cluster.workers.script(ANY_WORKER, "decode", Fault(after_tokens=1))
        running = asyncio.create_task(complete(cluster, headers))
        await until(lambda: cluster.workers.running)
        running.cancel()
        await asyncio.wait([running])
        await until(lambda: not cluster.workers.running)
        async with asyncio.timeout(10):
            while (await complete(cluster, headers)).status_code == 429:
                await asyncio.sleep(0.02)

    async def test_a_gateway_that_dies_holds_no_place_for_long(self, start_cluster, keys) -> None:
        headers = await keys.create(concurrent=1)
        cluster = await start_cluster(locks=keys.locks)
        dead = LockedDoor(*keys.locks, GatewayMetrics(), SystemClock())
        await dead.open()
        await dead.enter(dead.visit("POST", "/v1/completions", Headers(headers), "left behind"))
        assert (await complete(cluster, headers)).status_code == 429
        keys.time.advance(LEASE_S)
        assert (await complete(cluster, headers)).status_code == 200

    async def test_a_request_that_runs_for_long_keeps_its_place(self, start_cluster, keys) -> None:
        headers = await keys.create(concurrent=1)
        cluster = await start_cluster(locks=keys.locks)
        door = cluster.gateway.door
        await door.enter(door.visit("POST", "/v1/completions", Headers(headers), "long"))
        for _ in range(5):
            keys.time.advance(LEASE_S - 1)
            await door.visits.settle_running()
            assert (await complete(cluster, headers)).status_code == 429

    async def test_while_the_store_is_away_each_gateway_counts_alone(self, start_cluster, keys) -> None:
        headers = await keys.create(requests_per_minute=3)
        one, other = [await start_cluster(locks=keys.locks) for _ in range(2)]
        assert (await complete(one, headers)).status_code == 200
        keys.limits.available = False
        assert [(await complete(one, headers)).status_code for _ in range(3)] == [200, 200, 429]
        assert [(await complete(other, headers)).status_code for _ in range(4)] == [200, 200, 200, 429]

    async def test_a_key_without_limits_needs_no_store(self, start_cluster, keys) -> None:
        headers = await keys.create()
        keys.limits.available = False
        cluster = await start_cluster(locks=keys.locks)
        answer = await complete(cluster, headers)
        assert answer.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)

    async def test_limits_that_are_changed_count_without_a_restart(self, start_cluster, keys) -> None:
        headers = await keys.create(requests_per_minute=1)
        cluster = await start_cluster(locks=keys.locks)
        assert [(await complete(cluster, headers)).status_code for _ in range(2)] == [200, 429]
        await changes.change(keys.store, "alice", datetime.now(UTC), limits={"requests_per_minute": None})
        await cluster.gateway.door.ring.refresh()
        assert (await complete(cluster, headers)).status_code == 200


async def test_labels_of_metrics_are_names_of_keys_and_not_too_many(keys) -> None:
    metrics = GatewayMetrics()
    door = LockedDoor(*keys.locks, metrics, SystemClock())
    made = [await keys.create(f"key{number}") for number in range(KEY_NAMES_MAX + 3)]
    await door.open()
    for number, headers in enumerate(made):
        await door.enter(door.visit("POST", "/v1/completions", Headers(headers), str(number)))
    shown = [line for line in metrics.text().decode().splitlines() if "key_requests_total{" in line]
    assert len(shown) == KEY_NAMES_MAX + 1
    assert f'diptych_gateway_key_requests_total{{key="{OTHER_KEYS}"}} 3.0' in shown


async def test_a_right_and_a_wrong_key_look_to_openai_s_client_as_openai_s_do(start_cluster, keys) -> None:
    headers = await keys.create(requests_per_minute=1)
    cluster = await start_cluster(locks=keys.locks)
    key = headers["Authorization"].removeprefix("Bearer ")

    def client(key):
        url = f"{cluster.url}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, http_client=cluster.http)

    answer = await client(key).completions.create(**BODY)
    assert answer.choices[0].text == ANSWER
    with pytest.raises(openai.RateLimitError) as limited:
        await client(key).completions.create(**BODY)
    assert limited.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.AuthenticationError) as wrong:
        await client("sk-wrong").completions.create(**BODY)
    assert wrong.value.code == "invalid_api_key"


async def test_keys_of_one_cache_group_share_prompts_and_no_kept_responses(start_cluster, keys) -> None:
    one, other = [await keys.create(name, cache_group="team") for name in ("alice", "bob")]
    cluster = await start_cluster(locks=keys.locks)
    asked = {"model": MODEL, "input": "France", "max_output_tokens": 20}
    kept = await cluster.http.post("/v1/responses", json=asked, headers=one)
    await cluster.http.post("/v1/responses", json=asked, headers=other)
    assert len({call.sequence.salt for call in cluster.workers.calls}) == 1
    path = f"/v1/responses/{kept.json()['id']}"
    assert (await cluster.http.get(path, headers=one)).status_code == 200
    assert (await cluster.http.get(path, headers=other)).status_code == 404
    fresh = bearer((await changes.rotate(keys.store, "alice", datetime.now(UTC)))[1])
    await cluster.gateway.door.ring.refresh()
    assert (await cluster.http.get(path, headers=fresh)).status_code == 200
