"""Tenants share nothing: keys and salts become digests that no two pairs of them have in common."""

import logging
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.block_hash import chain_hashes, chain_root
from services.gateway.door.tenant import ANYBODY, Tenant
from tests.unit.gateway.in_memory_cluster import MODEL, InMemoryCluster

PROMPT = [n % 900 + 100 for n in range(400)]
KEY, OTHER = "Bearer key-one", "Bearer key-two"


@pytest.fixture
def network() -> bool:
    return False


def test_a_key_is_what_a_bearer_header_carries() -> None:
    assert Tenant.of("Bearer abc") == Tenant.of("bearer  abc ") != Tenant.of("Bearer abd")
    for nobody in (None, "", "Bearer", "Bearer  ", "Basic abc", "abc"):
        assert Tenant.of(nobody) == ANYBODY


@given(st.text(st.characters(codec="latin-1"), min_size=16))
def test_nothing_of_a_tenant_contains_its_key_or_gives_away_another_of_its_digests(key) -> None:
    tenant = Tenant.of(f"Bearer {key}")
    if tenant is ANYBODY:
        return
    shown = [tenant.id, tenant.salt("", "key"), tenant.salt("mine", "key")]
    assert not any(key in text or key.encode().hex() in text for text in shown)
    assert not any(short in long for short, long in combinations([*shown, tenant.cache_key.hex()], 2))


def test_requests_of_one_key_share_and_of_two_do_not() -> None:
    one, two = Tenant.of(KEY), Tenant.of(OTHER)
    assert one.salt("", "key") == Tenant.of(KEY).salt("", "key")
    assert len({one.salt("", "key"), two.salt("", "key"), ANYBODY.salt("", "key")}) == 3


def test_a_cluster_may_share_between_keys_and_never_between_salts() -> None:
    one, two = Tenant.of(KEY), Tenant.of(OTHER)
    assert one.salt("", "cluster") == two.salt("", "cluster") == ANYBODY.salt("", "cluster") == ""
    assert one.salt("mine", "cluster") == two.salt("mine", "cluster") not in ("", one.salt("mine", "key"))


def test_key_and_salt_cannot_be_split_in_another_way() -> None:
    key = Tenant.of("Bearer ab")
    digest = key.cache_key.decode("latin-1")
    pairs = [
        ("Bearer a", "b"),
        ("Bearer ab", ""),
        ("Bearer a b", ""),
        ("Bearer a:b", ""),
        ("Bearer a", ":b"),
        ("Bearer a", "\0b"),
        ("Bearer a\0b", ""),
        (None, "ab"),
        (None, digest),
        (None, key.cache_key.hex()),
        (None, key.salt("", "key")),
        (None, "diptych-salt-key"),
    ]
    salts = [Tenant.of(header).salt(salt, "key") for header, salt in pairs]
    assert len(set(salts)) == len(pairs)


@given(st.sets(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=8))
def test_no_two_pairs_of_a_key_and_a_salt_have_one_salt(pairs) -> None:
    named = {(Tenant.of(f"Bearer {key}"), salt) for key, salt in pairs}
    assert len({tenant.salt(salt, "key") for tenant, salt in named}) == len(named)


async def warm(cluster: InMemoryCluster, tenant: Tenant, worker_id: str) -> None:
    """The worker has the prompt in its cache for that tenant."""
    worker = cluster.gateway.view.report(worker_id)
    root = chain_root(worker.compatibility, tenant.salt("", cluster.gateway.config.cache_sharing))
    await cluster.index.begin(worker.key)
    await cluster.index.publish(worker.key, chain_hashes(PROMPT, worker.compatibility.block_size, root), [])


async def route_of(cluster: InMemoryCluster, header: str | None, **body) -> dict:
    """Where such a request goes; it is answered, too."""
    headers = {"Authorization": header} if header else {}
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, **body}
    explained = await cluster.http.post("/v1/route", json=asked, headers=headers)
    answered = await cluster.http.post("/v1/completions", json={**asked, "explain": True}, headers=headers)
    assert (explained.status_code, answered.status_code) == (200, 200)
    (route,) = answered.json()["routes"]
    assert as_others_see(route) == as_others_see(explained.json()["route"])
    return route


def as_others_see(route: dict) -> dict:
    """Without the drawing of equal offers."""
    offers = sorted(({**offer, "chosen": None} for offer in route["offers"]), key=lambda o: str(o.values()))
    return {**route, "prefill_worker": None, "decode_worker": None, "offers": offers}


async def test_a_route_shows_a_tenant_s_cache_to_that_tenant_only(start_cluster) -> None:
    cold, cluster = await start_cluster(), await start_cluster()
    await warm(cluster, Tenant.of(KEY), "p2")
    own = await route_of(cluster, KEY)
    assert own["prefill_worker"] == "p2"
    assert max(offer["cached_tokens"] for offer in own["offers"]) == len(PROMPT)
    for header, body in ((OTHER, {}), (None, {}), (KEY, {"cache_salt": "mine"})):
        foreign = await route_of(cluster, header, **body)
        assert as_others_see(foreign) == as_others_see(await route_of(cold, header, **body))
        assert all(offer["cached_tokens"] == offer["fetched_tokens"] == 0 for offer in foreign["offers"])


async def test_no_prefix_is_fetched_from_another_tenant_s_cache(start_cluster) -> None:
    cluster = await start_cluster()
    await warm(cluster, Tenant.of(KEY), "d1")
    await route_of(cluster, KEY)
    own = [call.sequence for call in cluster.workers.calls if call.kind == "prefill"]
    assert own[0].prefix is not None
    for header in (OTHER, None):
        del cluster.workers.calls[:]
        await route_of(cluster, header)
        assert [call.sequence.prefix for call in cluster.workers.calls] == [None, None]
        assert own[0].salt not in [call.sequence.salt for call in cluster.workers.calls]


async def test_a_cluster_that_shares_finds_every_key_s_prompts(start_cluster) -> None:
    cluster = await start_cluster(cache_sharing="cluster")
    await warm(cluster, Tenant.of(KEY), "p2")
    assert (await route_of(cluster, OTHER))["prefill_worker"] == "p2"
    separate = await route_of(cluster, OTHER, cache_salt="mine")
    assert all(offer["cached_tokens"] == 0 for offer in separate["offers"])


async def test_a_key_reaches_no_log_no_worker_and_no_metric(start_cluster, caplog) -> None:
    cluster = await start_cluster()
    secret = "sk-a-secret-that-nobody-may-see"
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "cache_salt": "my-own-salt"}
    headers = {"Authorization": f"Bearer {secret}"}
    with caplog.at_level(logging.DEBUG):
        response = await cluster.http.post("/v1/completions", json=asked, headers=headers)
    assert response.status_code == 200
    assert {call.sequence.salt for call in cluster.workers.calls} == {
        Tenant.of(headers["Authorization"]).salt("my-own-salt", "key")
    }
    assert "routed attempt" in caplog.text
    shown = [caplog.text, repr(cluster.workers.calls), cluster.gateway.metrics.text().decode()]
    assert not any(word in text for text in shown for word in (secret, "my-own-salt"))
