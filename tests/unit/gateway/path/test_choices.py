"""n > 1 through the gateway: every choice whole and by itself, one prompt, whatever fails."""

import asyncio
import json
import tracemalloc
from collections import defaultdict
from dataclasses import dataclass, field

import openai
import pytest

from services.core.errors import EngineFailed, KvSourceLost, Overloaded, WorkerLost
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.workers.memory_worker_client import ANY_WORKER, Call, Fault
from tests.unit.gateway.in_memory_cluster import MODEL, until
from tests.unit.gateway.scripted_worker_server import report

N = 3
BODY = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 200, "n": N, "timings": True}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "France?"}], "n": N}
LOST = WorkerLost("connection reset")
MANY = [report("p1", "prefill"), *(report(f"d{n}", "decode", address=f"d{n}:1") for n in range(6))]


@pytest.fixture
def network() -> bool:
    return False


def ids_of(cluster, choice: int) -> list[int]:
    return cluster.answer_ids[choice:]


def text_of(cluster, choice: int) -> str:
    text = Detokenizer(cluster.gateway.model.token_bytes)
    return "".join(map(text.feed, ids_of(cluster, choice)[:-1])) + text.flush()


async def ask(cluster, path: str = "/v1/completions", **more) -> dict:
    body = (BODY if path == "/v1/completions" else CHAT) | {"return_token_ids": True} | more
    answered = await cluster.http.post(path, json=body)
    assert answered.status_code == 200, answered.text
    return answered.json()


def assert_whole(cluster, answer: dict, n: int = N) -> None:
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(n))
    assert [choice["token_ids"] for choice in choices] == [ids_of(cluster, c) for c in range(n)]
    assert [choice["text"] for choice in choices] == [text_of(cluster, c) for c in range(n)]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * n
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == sum(len(ids_of(cluster, c)) for c in range(n))


@dataclass
class Streamed:
    """A stream by choice."""

    text: defaultdict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    finishes: list[tuple[int, str]] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    usage: dict | None = None

    def add(self, chunk: dict) -> None:
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in dict(self.finishes), "something came after the finish"
            delta = choice.get("delta", {})
            if "role" in delta:
                assert index not in self.text, "the role came after text"
                self.roles.append(index)
            self.text[index] += choice.get("text", delta.get("content", ""))
            self.token_ids[index] += choice.get("token_ids", [])
            if choice["finish_reason"]:
                self.finishes.append((index, choice["finish_reason"]))


async def stream(cluster, path: str = "/v1/completions", **more) -> Streamed:
    body = (BODY if path == "/v1/completions" else CHAT) | {"return_token_ids": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, **more}
    lines = [
        line.removeprefix("data: ") for line in (await cluster.http.post(path, json=body)).text.split("\n\n")
    ]
    assert lines[-2:] == ["[DONE]", ""]
    streamed = Streamed()
    for line in lines[:-2]:
        streamed.add(json.loads(line))
    return streamed


def decodes(cluster) -> list[Call]:
    return [call for call in cluster.workers.calls if call.kind == "decode"]


async def test_a_whole_answer_has_every_choice_and_counts_the_prompt_once(cluster) -> None:
    assert_whole(cluster, await ask(cluster))
    assert [call.kind for call in cluster.workers.calls] == ["prefill", "decode"]
    assert {call.sequence.choices for call in cluster.workers.calls} == {(0, 1, 2)}
    assert cluster.metric("prompt_tokens_total") == 3
    assert cluster.metric("completion_tokens_total") == sum(len(ids_of(cluster, c)) for c in range(N))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_names_the_choice_of_every_chunk_and_finishes_each_once(cluster, path) -> None:
    streamed = await stream(cluster, path)
    assert dict(streamed.text) == {choice: text_of(cluster, choice) for choice in range(N)}
    assert dict(streamed.token_ids) == {choice: ids_of(cluster, choice) for choice in range(N)}
    assert sorted(streamed.finishes) == [(choice, "stop") for choice in range(N)]
    assert streamed.roles == ([0, 1, 2] if "chat" in path else [])
    assert streamed.usage["completion_tokens"] == sum(len(ids_of(cluster, c)) for c in range(N))


async def test_the_last_chunk_alone_has_the_timings(cluster) -> None:
    text = (await cluster.http.post("/v1/completions", json=BODY | {"stream": True})).text
    *chunks, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    assert ["timings" in json.loads(chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("network", [True])
async def test_the_openai_client_gets_all_choices(cluster) -> None:
    client = openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    async with client:
        answer = await client.chat.completions.create(n=2, **{k: v for k, v in CHAT.items() if k != "n"})
    assert [choice.message.content for choice in answer.choices] == [text_of(cluster, c) for c in range(2)]


async def test_one_choice_asks_for_what_it_always_did(cluster) -> None:
    assert_whole(cluster, await ask(cluster, n=1), n=1)
    assert_whole(cluster, await ask(cluster, n=None), n=1)
    assert {call.sequence.choices for call in cluster.workers.calls} == {(0,)}


async def test_choices_of_one_token_need_no_decode_worker(cluster) -> None:
    answer = await ask(cluster, max_tokens=1)
    assert [choice["token_ids"] for choice in answer["choices"]] == [
        [ids_of(cluster, c)[0]] for c in range(N)
    ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * N
    assert [call.kind for call in cluster.workers.calls] == ["prefill"]


async def test_choices_that_end_at_their_first_token_leave_the_others_to_go_on(cluster) -> None:
    answer = await ask(cluster, stop_token_ids=[ids_of(cluster, 1)[0]])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * N
    assert answer["choices"][1]["token_ids"] == ids_of(cluster, 1)[:1]
    assert answer["choices"][2]["token_ids"] == ids_of(cluster, 2)


async def test_without_prefill_workers_the_decode_worker_does_all(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode")])
    assert_whole(cluster, await ask(cluster))
    assert cluster.metric("routes_total", kind="decode_alone") == 1


async def test_a_stop_string_ends_its_choice_on_the_worker_and_the_others_go_on(cluster) -> None:
    """The stop string is the answer's first word, which the choices after the first leave out."""
    word = cluster.gateway.model.token_bytes.of(cluster.answer_ids[0]).decode()
    cluster.workers.script(ANY_WORKER, "decode", hanging := Fault(None, after_tokens=1))
    asking = asyncio.create_task(ask(cluster, stop=word))
    await until(lambda: cluster.workers.ended_choices)
    hanging.end.set()
    answer = await asking
    assert [choice for _, choice in cluster.workers.ended_choices] == [0]
    assert answer["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
        "token_ids": ids_of(cluster, 0)[:1],
    }
    assert [choice["text"] for choice in answer["choices"][1:]] == [text_of(cluster, c) for c in (1, 2)]
    assert answer["usage"]["completion_tokens"] == 1 + sum(len(ids_of(cluster, c)) for c in (1, 2))


async def test_stop_strings_in_all_choices_end_the_request_at_once(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=12))
    answer = await ask(cluster, stop=["capital"])
    assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
    assert all("capital" not in choice["text"] for choice in answer["choices"])


async def test_a_client_that_goes_cancels_all_choices(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=2))
    asking = asyncio.create_task(ask(cluster))
    await until(lambda: decodes(cluster))
    asking.cancel()
    await asyncio.wait([asking])
    assert cluster.workers.running == []


@pytest.mark.parametrize(
    "error", [LOST, KvSourceLost("gone"), EngineFailed("boom")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("tokens", [1, 4])
async def test_after_a_failure_each_choice_goes_on_by_itself_with_the_same_tokens(
    cluster, error, tokens
) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(error, after_tokens=tokens))
    answer = await ask(cluster)
    assert_whole(cluster, answer)
    first, *resumed = [call.sequence for call in decodes(cluster)]
    assert sorted(sequence.choices for sequence in resumed) == [(0,), (1,), (2,)]
    for sequence in resumed:
        assert sequence.output_ids == ids_of(cluster, sequence.choices[0])[: 1 + tokens]
        assert sequence.sampling == first.sampling
    assert len({sequence.attempt for sequence in [first, *resumed]}) == 4
    assert answer["timings"]["attempts"] == 4


async def test_a_resumed_stream_shows_no_seam(start_cluster) -> None:
    cluster = await start_cluster(reports=MANY)
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=5), Fault(LOST, after_tokens=2))
    streamed = await stream(cluster)
    assert dict(streamed.token_ids) == {choice: ids_of(cluster, choice) for choice in range(N)}
    assert streamed.usage["completion_tokens"] == sum(len(ids_of(cluster, c)) for c in range(N))


async def test_before_any_token_the_choices_are_tried_again_together(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode"), report("d2", "decode")])
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST), Fault(Overloaded("full")))
    assert_whole(cluster, await ask(cluster))
    assert [call.sequence.choices for call in decodes(cluster)] == [(0, 1, 2)] * 3


async def test_choices_that_had_finished_are_not_resumed(cluster) -> None:
    """Choice 2 ends two tokens before choice 0."""
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=len(cluster.answer_ids) - 2))
    assert_whole(cluster, await ask(cluster))
    assert [call.sequence.choices for call in decodes(cluster)][1:] == [(0,)]


async def test_choices_with_the_same_tokens_so_far_are_resumed_together(cluster) -> None:
    """Like greedy ones."""
    cluster.answer_ids[:] = [cluster.answer_ids[0]] * 9
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=4))
    answer = await ask(cluster, max_tokens=8, ignore_eos=True)
    assert [choice["token_ids"] for choice in answer["choices"]] == [cluster.answer_ids[:8]] * N
    assert [call.sequence.choices for call in decodes(cluster)] == [(0, 1, 2)] * 2


async def test_one_choice_failing_again_and_again_leaves_the_others_their_attempts(start_cluster) -> None:
    cluster = await start_cluster(attempts_max=3, reports=MANY)
    cluster.workers.script(ANY_WORKER, "decode", *[Fault(LOST, after_tokens=1)] * 4)
    assert_whole(cluster, await ask(cluster))
    visits = cluster.metric("stage_seconds_count", stage="admitted")
    assert visits == 2, "at first, and when all failed together; later failures let the others go on"


async def test_a_choice_that_cannot_be_saved_fails_the_request_and_ends_the_others(start_cluster) -> None:
    cluster = await start_cluster(attempts_max=2)
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=1), Fault(LOST), Fault(), Fault())
    answered = await cluster.http.post("/v1/completions", json=BODY)
    assert answered.status_code == 503
    assert cluster.workers.running == []
    assert cluster.metric("requests_total", endpoint="completions", outcome="worker_lost") == 1


async def test_a_choice_that_waits_for_room_does_not_hold_the_others(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode")], admission_timeout_s=60)
    faults = [Fault(Overloaded("revoked"), after_tokens=2), *[Fault(Overloaded("full"))] * 3]
    cluster.workers.script("d1", "decode", *faults)
    assert_whole(cluster, await ask(cluster))
    assert cluster.metric("retries_total", error="overloaded") == 4
    assert cluster.metric("queue_length", priority="normal") == 0


async def test_a_stopped_choice_is_not_resumed(cluster) -> None:
    word = cluster.gateway.model.token_bytes.of(cluster.answer_ids[0]).decode()
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=3))
    answer = await ask(cluster, stop=word)
    assert sorted(call.sequence.choices for call in decodes(cluster)[1:]) == [(1,), (2,)]
    assert [choice["text"] for choice in answer["choices"]] == ["", text_of(cluster, 1), text_of(cluster, 2)]


async def test_a_stop_string_found_while_choices_go_on_apart_ends_only_its_choice(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=1))
    answer = await ask(cluster, stop=[" capital"])
    for choice in range(N):
        assert answer["choices"][choice]["text"] == text_of(cluster, choice).split(" capital")[0]
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert ids == [ids_of(cluster, c)[: len(ids[c])] for c in range(N)]
    assert answer["usage"]["completion_tokens"] == sum(map(len, ids))


async def test_a_stop_string_among_choices_that_were_resumed_together_ends_only_its_choice(
    start_cluster,
) -> None:
    """The first failure leaves choices 1 and 2 with equal tokens, choice 0 with others."""
    cluster = await start_cluster(reports=MANY)
    first, second, *rest = cluster.answer_ids
    cluster.answer_ids[:] = [first, second, second, second, *rest]
    stop = text_of(cluster, 2)[:12]
    hanging = [Fault(None, after_tokens=6) for _ in range(2)]
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=1), *hanging)
    asking = asyncio.create_task(ask(cluster, stop=stop, max_tokens=20))
    await until(lambda: cluster.workers.ended_choices)
    for fault in hanging:
        fault.end.set()
    await asking
    assert {call.sequence.choices for call in decodes(cluster)[1:]} == {(0,), (1, 2)}
    ((call, choice),) = cluster.workers.ended_choices
    assert (call.sequence.choices, choice) == ((1, 2), 2)


async def test_a_configured_maximum_bounds_n(start_cluster) -> None:
    cluster = await start_cluster(choices_max=2)
    assert_whole(cluster, await ask(cluster, n=2), n=2)
    answered = await cluster.http.post("/v1/completions", json=BODY)
    assert answered.status_code == 400
    assert answered.json()["error"]["param"] == "n"
    assert "at most 2" in answered.json()["error"]["message"]


async def test_an_absurd_n_is_refused_before_anything_is_made_for_its_choices(cluster) -> None:
    await ask(cluster)  # what is loaded once is loaded
    tracemalloc.start()
    try:
        answered = await cluster.http.post("/v1/completions", json=BODY | {"n": 1_000_000})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, "n")
    assert peak_bytes < 8 << 20


async def test_choices_count_against_a_worker_that_has_not_reported_them(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=1))
    asking = asyncio.create_task(ask(cluster))
    await until(lambda: decodes(cluster))
    assert sum(view.running for view in cluster.gateway.view.worker_views()) == N
    asking.cancel()
    await asyncio.wait([asking])
