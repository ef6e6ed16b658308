"""The Prefill service: computes prompts, answers with the first tokens, leases the KV to a puller.

One Run is one sequence of kind `prefill` and one lease. The engine's events move the lease forward;
Run waits for the first token (of each choice), a Pull (`services.transfer.server`) streams the blocks
meanwhile.
"""

import asyncio
from collections.abc import Callable

import grpc.aio

from services.core.clock import Clock
from services.core.errors import BadRequest, DiptychError, KvSourceLost, PullerLost, from_label
from services.engine.handle import EngineHandle, Event, Stalled
from services.engine.incarnation import Incarnation
from services.engine.messages import Admitted, Advanced, Failed, Refused, Revoked, Scored, Submit, Token
from services.engine.submission import SequenceBounds
from services.transfer.fetch import PrefixFetcher, PrefixOffer, prefix_offer
from services.transfer.lease import Lease, LeaseTable
from services.transfer.protocol import FirstToken
from services.wire.channel import abort
from services.wire.convert import prompt_logprobs_to_wire, sampled_to_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc


class PrefillService(worker_pb2_grpc.PrefillServicer):
    def __init__(
        self,
        engine: EngineHandle,
        leases: LeaseTable,
        incarnation: Incarnation,
        bounds: SequenceBounds,
        clock: Clock,
        pull_wait_s: float,
        on_failed: Callable[[DiptychError], None],
        fetcher: PrefixFetcher,
    ) -> None:
        """Whoever frees a lease's blocks must first stop `fetcher` on its sequence."""
        self._engine = engine
        self._leases = leases
        self._incarnation = incarnation
        self._bounds = bounds
        self._clock = clock
        self._pull_wait_s = pull_wait_s
        self._on_failed = on_failed
        self._fetcher = fetcher

    async def Run(
        self,
        request: worker_pb2.PrefillRequest,
        context: "grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillReply]",
    ) -> worker_pb2.PrefillReply:
        try:
            return await self._run(request)
        except DiptychError as error:
            self._on_failed(error)
            await abort(context, error)

    async def _run(self, request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
        self._incarnation.check(request.epoch, "prefill")
        submit = self._bounds.submission(request.sequence, "prefill")
        # Known to the engine alone it would be a sequence that this worker decodes.
        if self._leases.knows(submit.seq_id) or self._engine.knows(submit.seq_id):
            raise BadRequest(f"attempt {submit.seq_id} is running already", "attempt")
        lease = self._leases.open(submit.seq_id, len(submit.prompt_ids) + len(submit.output_ids))
        try:
            with self._leases.hold(lease):
                if request.expect_pull:
                    await self._wait_for_pull(lease)
                compute_ms = await self._compute(submit, lease, prefix_offer(request.sequence))
        except DiptychError as error:
            self._leases.fail(lease, error)
            raise
        except asyncio.CancelledError:
            # Only a reader whose gateway still wants the answer, but lost its way to us, ever sees this.
            self._leases.fail(lease, KvSourceLost("the prefill was cancelled"))
            raise
        if not request.expect_pull:
            self._leases.release(lease.transfer_id)
        return worker_pb2.PrefillReply(
            firsts=[sampled_to_wire(f.index, f.token, f.finish, f.choice, f.logprobs) for f in lease.firsts],
            cached_tokens=lease.cached_tokens,
            queue_ms=lease.queue_ms,
            compute_ms=compute_ms,
            fetched_tokens=lease.fetched_tokens,
            fetch_ms=lease.fetch_ms,
            prompt_logprobs=map(prompt_logprobs_to_wire, lease.prompt_logprobs),
        )

    async def _compute(self, submit: Submit, lease: Lease, prefix: PrefixOffer | None) -> float:
        """Wait for the first tokens; the milliseconds from the sequence's admission to them, without those
        of a fetch."""
        submitted_s = self._clock.now()
        self._engine.submit(submit, lambda event: self._on_event(lease, prefix, event))
        await lease.until(lambda: lease.complete)
        assert len(lease.firsts) == len(submit.choices), "all first tokens come at once"
        return (lease.complete_at_s - submitted_s) * 1e3 - lease.queue_ms - lease.fetch_ms

    async def _wait_for_pull(self, lease: Lease) -> None:
        """No block is allocated before the pull proves that the decode worker has room."""
        try:
            async with asyncio.timeout(self._pull_wait_s):
                await lease.until(lambda: lease.pulled)
        except TimeoutError:
            raise PullerLost(f"no decode worker pulled within {self._pull_wait_s:g} s") from None

    def _on_event(self, lease: Lease, prefix: PrefixOffer | None, event: Event) -> None:
        match event:
            case Admitted():
                lease.admitted(event.block_ids, event.cached_tokens, event.queue_ms)
                if event.fetch_tokens:
                    assert prefix is not None
                    self._fetcher.start(
                        *(prefix, event.block_ids, event.cached_tokens, event.fetch_tokens),
                        done=lambda fetched: lease.fetched(fetched.tokens, fetched.ms),
                    )
            case Advanced():
                lease.advanced(event.computed, event.block_ids)
            case Scored():
                lease.prompt_logprobs.append(event.logprobs)
            case Token():
                first = FirstToken(event.index, event.token, event.finish, event.choice, event.logprobs)
                lease.finished(first, self._clock.now())
            case Refused() | Failed():
                self._leases.fail(lease, from_label(event.code, event.message))
            case Stalled():
                if not lease.complete:  # else its reader does not need the engine
                    self._leases.fail(lease, event.error)
            case Revoked():
                raise AssertionError("a prefill sequence cannot be revoked")
