"""A worker is killed at every moment of a request's life: its client gets the undisturbed answer.

Workers in this process, over real gRPC, with an arithmetic model whose engines a test stops at exact
steps. Real processes are killed in tests/e2e.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.gateway.served_model import ServedModel
from tests.support.completions import Answer
from tests.support.in_process_cluster import InProcessCluster, InProcessWorker, in_process_cluster, until

PROMPT = [n * 7919 % 40_000 + 100 for n in range(60)]
PREFILL_STEPS = 8
TOKENS = 24
SAMPLED = {"temperature": 0.9, "seed": 5}


@pytest.fixture
async def cluster(model: ServedModel) -> AsyncIterator[InProcessCluster]:
    async with in_process_cluster(model) as cluster:
        yield cluster


class Running:
    """A request whose workers of one role stop after so many steps (0: before the first)."""

    def __init__(
        self,
        cluster: InProcessCluster,
        role: str,
        steps: int,
        asking: asyncio.Task | None = None,
        **body: Any,
    ) -> None:
        self.cluster = cluster
        self.stopping = [worker for name, worker in cluster.workers.items() if name[0] == role[0]]
        for worker in self.stopping:
            worker.engine.steps_left = steps or None
            worker.engine.paused = steps == 0
        self.answering = asking or asyncio.create_task(cluster.answer(**{"prompt": PROMPT, **body}))

    async def stopped(self) -> InProcessWorker:
        """The one that has taken it, once it has stopped."""
        await until(lambda: any(w.engine.paused and w.engine.sequences for w in self.stopping))
        return next(worker for worker in self.stopping if worker.engine.sequences)

    async def kill(self) -> str:
        """Kill it where it stopped; the others go on. Its name."""
        name = (await self.stopped()).key.worker_id
        await self.cluster.kill(name)
        for worker in self.stopping:
            if worker.key.worker_id != name:
                worker.engine.resume()
        return name


def check(answer: Answer, right: Answer) -> None:
    assert answer.token_ids == right.token_ids
    assert answer.text == right.text
    for what in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer.usage[what] == right.usage[what]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("worker", ["p0", "p1", "d0", "d1"])
async def test_killed_before_the_request_came_while_it_is_still_listed(
    cluster: InProcessCluster, worker: str, sampling: dict
) -> None:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, **sampling}
    right = await cluster.answer(**body, cache_salt="undisturbed")
    await cluster.kill(worker)
    answers = [await cluster.answer(**body) for _ in range(4)]
    for answer in answers:
        check(answer, right)
        assert worker not in (answer.timings["prefill_worker"], answer.timings["decode_worker"])


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("role", "steps"),
    [
        pytest.param("prefill", 0, id="prefill worker before its first step"),
        pytest.param("prefill", 3, id="prefill worker in the middle"),
        pytest.param("prefill", PREFILL_STEPS, id="prefill worker after its last step"),
        pytest.param("decode", 0, id="decode worker before it has reserved blocks"),
        pytest.param("decode", 1, id="decode worker after its first step"),
        pytest.param("decode", 10, id="decode worker in the middle"),
        pytest.param("decode", TOKENS - 2, id="decode worker before its last step"),
    ],
)
async def test_killed_while_it_works(
    cluster: InProcessCluster, role: str, steps: int, sampling: dict
) -> None:
    body = {"max_tokens": TOKENS, **sampling}
    right = await cluster.answer(prompt=PROMPT, cache_salt="undisturbed", **body)
    if steps == PREFILL_STEPS:  # the transfer is not over so soon
        for reader, source in cluster.links:
            cluster.link(reader, source).delay_s = 0.0 if reader == "gateway" else 0.2
    running = Running(cluster, role, steps, **body)
    killed = await running.kill()
    answer = await running.answering
    check(answer, right)
    assert answer.timings[f"{role}_worker"] != killed
    assert answer.timings["attempts"] == 2


async def test_both_workers_of_a_request_die(cluster: InProcessCluster) -> None:
    right = await cluster.answer(prompt=PROMPT, max_tokens=TOKENS, cache_salt="undisturbed")
    running = Running(cluster, "decode", 10, max_tokens=TOKENS)
    name = (await running.stopped()).key.worker_id
    for prefill in ("p0", "p1"):
        await cluster.kill(prefill)
    await cluster.kill(name)
    for worker in running.stopping:
        worker.engine.resume()
    check(await running.answering, right)


async def test_the_only_decode_worker_dies_and_comes_back(model: ServedModel) -> None:
    async with in_process_cluster(model, prefill=1, decode=1) as cluster:
        right = await cluster.answer(prompt=PROMPT, max_tokens=TOKENS, cache_salt="undisturbed")
        running = Running(cluster, "decode", 10, max_tokens=TOKENS)
        await running.kill()
        await asyncio.sleep(0.3)
        await cluster.start("d0")
        answer = await running.answering
        check(answer, right)
        assert answer.timings["attempts"] == 2


class TestAcrossTheSeam:
    """What ends an answer or counts its tokens holds where one worker's tokens end and another's begin."""

    SEAM = 10  # steps of the decode worker: tokens 0 to 10 come from before its death

    async def disturbed(self, cluster: InProcessCluster, **body: Any) -> Answer:
        running = Running(cluster, "decode", self.SEAM, **body)
        await running.kill()
        answer = await running.answering
        assert answer.timings["attempts"] == 2
        return answer

    async def undisturbed(self, cluster: InProcessCluster, **body: Any) -> Answer:
        return await cluster.answer(prompt=PROMPT, cache_salt="undisturbed", **body)

    @pytest.fixture
    async def whole(self, cluster: InProcessCluster) -> Answer:
        return await self.undisturbed(cluster, max_tokens=2 * TOKENS)

    @pytest.mark.parametrize("begins", [SEAM - 1, SEAM, SEAM + 1])
    async def test_a_stop_string_ends_the_answer(self, cluster, whole: Answer, model, begins: int) -> None:
        """Completed by a token after the seam; its first part may come from before."""
        texts = [model.tokenizer.decode([token], skip_special_tokens=True) for token in whole.token_ids]
        stop = "".join(texts[begins : begins + 3])
        right = await self.undisturbed(cluster, max_tokens=2 * TOKENS, stop=stop)
        assert len(right.token_ids) == begins + 3, "the text has the stop string elsewhere too"
        answer = await self.disturbed(cluster, max_tokens=2 * TOKENS, stop=stop)
        check(answer, right)
        assert answer.usage["completion_tokens"] == begins + 3

    async def test_max_tokens_counts_both_sides(self, cluster, whole: Answer) -> None:
        answer = await self.disturbed(cluster, max_tokens=TOKENS)
        assert answer.token_ids == whole.token_ids[:TOKENS]
        assert answer.usage["completion_tokens"] == TOKENS
        assert answer.usage["prompt_tokens"] == len(PROMPT)

    @pytest.mark.parametrize("min_tokens", [0, SEAM + 6])
    async def test_min_tokens_counts_both_sides(self, cluster, whole: Answer, min_tokens: int) -> None:
        """The stop token comes at SEAM + 4; it ends the answer unless min_tokens forbids that."""
        stop_id = whole.token_ids[self.SEAM + 4]
        body = {"max_tokens": TOKENS, "stop_token_ids": [stop_id], "min_tokens": min_tokens}
        right = await self.undisturbed(cluster, **body)
        answer = await self.disturbed(cluster, **body)
        check(answer, right)
        assert len(answer.token_ids) == (TOKENS if min_tokens else self.SEAM + 5)

    async def test_a_seed_that_was_drawn_is_kept(self, cluster) -> None:
        body = {"max_tokens": TOKENS, "temperature": 1.0}
        answer = await self.disturbed(cluster, **body)
        check(answer, await self.undisturbed(cluster, **body, seed=answer.timings["seed"]))

    async def test_all_choices_go_on(self, cluster) -> None:
        body = {"model": "SmolLM2-135M-Instruct", "n": 3, "max_tokens": TOKENS, **SAMPLED}
        body |= {"prompt": PROMPT, "return_token_ids": True, "ignore_eos": True}
        right = (await cluster.http.post("/v1/completions", json=body | {"cache_salt": "u"})).json()
        asking = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
        await Running(cluster, "decode", self.SEAM, asking).kill()
        answer = (await asking).json()
        assert answer["choices"] == right["choices"]
        assert answer["usage"]["completion_tokens"] == 3 * TOKENS
