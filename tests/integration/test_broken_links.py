"""Whatever happens to the network between gateway, prefill and decode worker, the answer is the
undisturbed one, and a counter tells what happened.

Real services and gRPC over links that the test controls; the model is arithmetic, so that a single wrong
byte of KV changes every token after it.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.core.sampling import SamplingParams
from services.engine.messages import Drop, Submit
from services.gateway.served_model import ServedModel
from services.transfer.protocol import FirstToken
from tests.support.completions import Answer
from tests.support.in_process_cluster import (
    InProcessCluster,
    InProcessWorker,
    in_process_cluster,
    until,
)

PROMPT = [n * 7919 % 40_000 + 100 for n in range(60)]  # eight prefill steps of eight tokens
MIDDLE = 3  # steps of eight
BLOCK_TOKENS, BLOCK_BYTES = 4, 32
PROMPT_BYTES = len(PROMPT) // BLOCK_TOKENS * BLOCK_BYTES
TOKENS = 24


@pytest.fixture
async def cluster(model: ServedModel) -> AsyncIterator[InProcessCluster]:
    """One prefill worker and one decode worker."""
    async with in_process_cluster(model, prefill=1, decode=1) as cluster:
        yield cluster


@pytest.fixture
async def spare(model: ServedModel) -> AsyncIterator[InProcessCluster]:
    """Two prefill workers and one decode worker."""
    async with in_process_cluster(model, prefill=2, decode=1) as cluster:
        yield cluster


async def undisturbed(cluster: InProcessCluster) -> Answer:
    """With a cache salt of its own, so that it leaves nothing that others could use."""
    return await cluster.answer(prompt=PROMPT, max_tokens=TOKENS, cache_salt="undisturbed")


def check(answer: Answer, right: Answer) -> None:
    assert answer.token_ids == right.token_ids
    assert answer.usage["prompt_tokens"] == len(PROMPT)
    assert answer.usage["completion_tokens"] == TOKENS


class Stopped:
    """A request whose transfer has stopped in the middle: its prefill worker computes no further."""

    def __init__(self, cluster: InProcessCluster, max_tokens: int = TOKENS) -> None:
        self.cluster = cluster
        self.workers = [worker for name, worker in cluster.workers.items() if name.startswith("p")]
        self.reader = cluster.workers["d0"].engine
        self.reader.landed_tokens = 0
        for worker in self.workers:
            worker.engine.steps_left = MIDDLE
        self.answering = asyncio.create_task(cluster.answer(prompt=PROMPT, max_tokens=max_tokens))

    async def reached(self) -> str:
        """Wait until all that was computed has arrived; the prefill worker it came from."""
        await until(lambda: self.reader.landed_tokens == MIDDLE * 8)
        return next(w.key.worker_id for w in self.workers if w.engine.sequences)

    async def resume(self) -> Answer:
        for worker in self.workers:
            worker.engine.resume()
        return await self.answering


async def test_a_slow_link_changes_nothing(cluster: InProcessCluster) -> None:
    right = await undisturbed(cluster)
    cluster.link("d0", "p0").delay_s = 0.03
    check(await cluster.answer(prompt=PROMPT, max_tokens=TOKENS), right)
    assert cluster.count("transfer_broken") == 0


async def test_a_link_that_is_cut_and_mended_goes_on_from_the_token_it_reached(
    cluster: InProcessCluster,
) -> None:
    right = await undisturbed(cluster)
    before = cluster.count("transfer_bytes", direction="received")
    stopped = Stopped(cluster)
    link = cluster.link("d0", await stopped.reached())
    link.cut()
    await until(lambda: cluster.count("transfer_broken", error="kv_link_lost") >= 1)
    link.mend()
    answer = await stopped.resume()
    check(answer, right)
    assert answer.timings["attempts"] == 1
    assert cluster.count("transfer_bytes", direction="received") - before == PROMPT_BYTES


async def test_a_link_that_stays_cut_is_replaced_by_one_to_another_prefill_worker(
    spare: InProcessCluster,
) -> None:
    right = await undisturbed(spare)
    stopped = Stopped(spare)
    source = await stopped.reached()
    spare.link("d0", source).cut()
    answer = await stopped.resume()
    check(answer, right)
    assert answer.timings["prefill_worker"] not in (source, None)
    assert spare.retries("kv_link_lost") == 1


async def test_without_another_prefill_worker_the_decode_worker_computes_behind_a_cut_link(
    cluster: InProcessCluster,
) -> None:
    right = await undisturbed(cluster)
    cluster.link("d0", "p0").cut()
    answer = await cluster.answer(prompt=PROMPT, max_tokens=TOKENS)
    check(answer, right)
    assert answer.timings["prefill_worker"] is None
    assert cluster.retries("kv_link_lost") == 1


async def test_a_pair_that_never_found_each_other_is_avoided_not_its_decode_worker(
    model: ServedModel,
) -> None:
    """The prefill worker gives up first: only the pair is known to have failed."""
    async with in_process_cluster(model, prefill=1, decode=1, pull_wait_s=0.2) as cluster:
        right = await undisturbed(cluster)
        cluster.link("d0", "p0").cut()
        answer = await cluster.answer(prompt=PROMPT, max_tokens=TOKENS)
        check(answer, right)
        assert answer.timings["decode_worker"] == "d0"
        assert cluster.retries("puller_lost") == 1
        assert cluster.retries("no_worker") == 0


async def test_a_link_that_swallows_everything_is_found_and_replaced(spare: InProcessCluster) -> None:
    right = await undisturbed(spare)
    stopped = Stopped(spare)
    source = await stopped.reached()
    spare.link("d0", source).hold_up()
    answer = await stopped.resume()
    check(answer, right)
    assert answer.timings["prefill_worker"] not in (source, None)
    assert spare.retries("kv_link_lost") == 1
    spare.link("d0", source).let_go()


async def test_kv_whose_confirmation_gets_lost_is_not_used(spare: InProcessCluster) -> None:
    """The link still brings the KV, but nothing passes the other way."""
    right = await undisturbed(spare)
    stopped = Stopped(spare)
    source = await stopped.reached()
    spare.link("d0", source).hold_up(back=False)
    for worker in stopped.workers:
        worker.engine.resume()
    await until(lambda: stopped.reader.landed_tokens == len(PROMPT))
    answer = await stopped.resume()
    check(answer, right)
    assert answer.timings["prefill_worker"] not in (source, None)
    assert spare.retries("kv_link_lost") == 1
    await until(lambda: spare.count("worker_leases_ended", how="expired") == 1)
    spare.link("d0", source).let_go()


class Flipper:
    """Flips one bit in the next so many payloads that pass. `times` counts down."""

    def __init__(self, times: int) -> None:
        self.times = times
        # The key of the prompt's first token, as it lies in the first block.
        self._mark = PROMPT[0].to_bytes(4, "little") + PROMPT[1].to_bytes(4, "little")

    def __call__(self, passing: bytes) -> bytes:
        at = passing.find(self._mark)
        if at < 0 or not self.times:
            return passing
        self.times -= 1
        return passing[:at] + bytes([passing[at] ^ 1]) + passing[at + 1 :]


async def test_a_bit_flipped_on_the_way_is_fetched_again(cluster: InProcessCluster) -> None:
    right = await undisturbed(cluster)
    cluster.link("d0", "p0").tamper = flipper = Flipper(times=2)
    answer = await cluster.answer(prompt=PROMPT, max_tokens=TOKENS)
    check(answer, right)
    assert flipper.times == 0
    assert cluster.count("transfer_broken", error="kv_corrupt") == 2
    assert answer.timings["attempts"] == 1


async def test_a_link_that_always_flips_bits_is_replaced(spare: InProcessCluster) -> None:
    right = await undisturbed(spare)
    spare.link("d0", "p0").tamper = spare.link("d0", "p1").tamper = Flipper(times=5)  # one attempt's pulls
    answer = await spare.answer(prompt=PROMPT, max_tokens=TOKENS)
    check(answer, right)
    assert spare.retries("kv_corrupt") == 1
    assert answer.timings["attempts"] == 2


async def test_a_lease_that_expires_in_the_middle_of_a_pull_ends_the_transfer(model: ServedModel) -> None:
    """The link is cut for longer than the lease lives, and the prefill has ended meanwhile."""
    async with in_process_cluster(model, prefill=2, decode=1, lease_ttl_s=0.2) as cluster:
        right = await undisturbed(cluster)
        stopped = Stopped(cluster)
        source = await stopped.reached()
        link = cluster.link("d0", source)
        link.cut()
        cluster.workers[source].engine.resume()
        await until(lambda: cluster.workers[source].count("worker_leases_ended", how="expired") == 1)
        link.mend()
        answer = await stopped.resume()
        check(answer, right)
        assert answer.timings["attempts"] == 2
        assert cluster.count("worker_leases_ended", how="expired") == 1


async def test_kv_that_is_confirmed_too_late_is_not_used(model: ServedModel) -> None:
    """All of it has arrived, but the confirmation travels longer than the lease lives."""
    async with in_process_cluster(model, prefill=2, decode=1, lease_ttl_s=0.2) as cluster:
        right = await undisturbed(cluster)
        stopped = Stopped(cluster)
        source = await stopped.reached()
        link, received = cluster.link("d0", source), cluster.count("transfer_bytes", direction="received")
        link.hold_up(back=False)
        cluster.workers[source].engine.resume()
        await until(lambda: stopped.reader.landed_tokens == len(PROMPT))
        await until(lambda: cluster.count("worker_leases_ended", how="expired") == 1)
        assert cluster.count("transfer_bytes", direction="received") == received, "it was accepted"
        link.let_go()
        check(await stopped.resume(), right)
        assert cluster.retries("lease_expired") == 1


async def test_kv_whose_blocks_were_reused_under_their_reader_is_not_used(spare: InProcessCluster) -> None:
    """The engine is made to break its promise: it drops the sequence behind the lease table's back, and
    another prompt takes the blocks before the reader has confirmed them."""
    right = await undisturbed(spare)
    stopped = Stopped(spare)
    name = await stopped.reached()
    source, link = spare.workers[name], spare.link("d0", name)
    link.hold_up()
    source.engine.resume()
    await until(lambda: source.engine.gauges.queued_prefill_tokens == 0)
    reuse_all_blocks(source)
    link.let_go()
    answer = await stopped.resume()
    check(answer, right)
    assert answer.timings["attempts"] == 2
    assert source.count("worker_leases_ended", how="stale") == 1


def reuse_all_blocks(worker: InProcessWorker) -> None:
    engine = worker.engine.engine
    for seq_id in list(engine._sequences):
        engine.handle(Drop(seq_id))
    prompt = list(range(worker.blocks * BLOCK_TOKENS))
    engine.handle(Submit("thief", "prefill", prompt, [], SamplingParams(max_tokens=1)))
    while engine.step():
        pass
    engine.handle(Drop("thief"))


async def test_a_worker_that_restarts_at_its_address_does_not_satisfy_an_old_pull(
    spare: InProcessCluster,
) -> None:
    """In its new life it even has a transfer of the same name, with other KV: what a pull must not get."""
    right = await undisturbed(spare)
    stopped = Stopped(spare)
    source = await stopped.reached()
    (transfer_id,) = spare.workers[source].engine.engine._sequences
    link = spare.link("d0", source)
    link.cut()
    await spare.kill(source)
    await spare.start(source)
    lease = spare.workers[source].server.leases.open(transfer_id, len(PROMPT))
    lease.admitted(list(range(15)), len(PROMPT), 0.0)
    lease.finished(FirstToken(0, 1, None), 0.0)
    link.mend()
    answer = await stopped.resume()
    check(answer, right)
    assert not lease.pulled
    assert answer.timings["attempts"] == 2


@pytest.mark.parametrize("how", ["cut", "hold_up"])
@pytest.mark.parametrize("worker", ["p0", "d0"])
async def test_a_worker_that_the_gateway_cannot_reach_lets_go_and_another_goes_on(
    model: ServedModel, worker: str, how: str
) -> None:
    """The worker lives, and what it holds for a gateway that it cannot hear comes back."""
    async with in_process_cluster(model) as cluster:
        right = await undisturbed(cluster)
        engine = cluster.workers[worker].engine
        engine.steps_left = 5
        answers = [asyncio.create_task(cluster.answer(prompt=PROMPT, max_tokens=TOKENS)) for _ in range(4)]
        await until(lambda: engine.paused and engine.sequences)
        getattr(cluster.link("gateway", worker), how)()
        engine.resume()
        engine.steps_left = 1  # it must not end the answer before the gateway has missed it
        for answer in await asyncio.gather(*answers):
            check(answer, right)
        assert cluster.retries("worker_lost") >= 1
        engine.resume()
        await cluster.until_quiet(within_s=8)
        cluster.link("gateway", worker).mend()
        cluster.link("gateway", worker).let_go()
