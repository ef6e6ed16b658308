"""Routes in words that clients understand: the chosen workers, and what each offer would have cost."""

from collections.abc import Collection, Mapping

from router.state import Offer, Route
from services.core.worker_report import WorkerReport
from services.gateway.admission.ticket import Ticket
from services.gateway.api.responses import CachedOn, ExplainedOffer, ExplainedRoute, RouteAnswer


def explained(route: Route) -> ExplainedRoute:
    """The chosen offers come first, then the others by score."""
    return ExplainedRoute(
        policy=route.policy,
        kind=route.kind,
        prefill_worker=route.prefill,
        decode_worker=route.decode,
        expected_first_token=_ms(route.expected_ttft_ms),
        expected_queue=_ms(route.computes.queue_ms),
        cost=_ms(route.cost_ms),
        offers=[_offer(offer, chosen=offer in route.chosen) for offer in route.ranked],
    )


def answer(
    model: str,
    ticket: Ticket,
    route: Route,
    wait_ms: float,
    workers: Collection[WorkerReport],
    unpaired: Mapping[str, str],
) -> RouteAnswer:
    """What is expected of a request that has just come, and waits `wait_ms` before it is routed."""
    located = ticket.located
    return RouteAnswer(
        object="route",
        model=model,
        prompt_tokens=ticket.sequence.known_tokens,
        expected_wait=_ms(wait_ms),
        route=explained(route),
        cached=[
            CachedOn(
                worker=report.worker_id,
                role=report.role,
                state=report.state,
                cached_tokens=located.cached.get(report.worker_id, 0),
                coming_tokens=located.coming.get(report.worker_id, 0),
            )
            for report in workers
        ],
        unpaired=dict(unpaired),
    )


def _offer(offer: Offer, *, chosen: bool) -> ExplainedOffer:
    return ExplainedOffer(
        worker=offer.worker.id,
        part=offer.part,
        chosen=chosen,
        score=_ms(offer.score),
        cost=_ms(offer.cost_ms),
        queue=_ms(offer.queue_ms),
        fetch=_ms(offer.fetch_ms),
        prefill=_ms(offer.prefill_ms),
        transfer=_ms(offer.transfer_ms),
        decode=_ms(offer.decode_ms),
        interference=_ms(offer.interference_ms),
        cached_tokens=offer.cached_tokens,
        fetched_tokens=offer.fetch.tokens if offer.fetch else 0,
        fetched_from=offer.fetch.source if offer.fetch else None,
    )


def _ms(milliseconds: float) -> float:
    return round(milliseconds, 3)
