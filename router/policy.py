"""How each policy scores the offers for one part of a request. The lowest score wins; equals are drawn.

    random         all are alike
    round_robin    the request's number says whose turn it is
    least_loaded   queued prompt tokens where the prompt is computed, sequences where it is decoded
    prefix_aware   prompt tokens that are not in the worker's cache, whatever the load
    cost           milliseconds (router/cost.py)

A policy only scores: who may be offered anything was decided before (router/route.py).
"""

from collections.abc import Callable, Mapping, Sequence

from router.state import Offer, Policy, RouteRequest

Scores = Callable[[Sequence[Offer], RouteRequest], Sequence[float]]


def scored(policy: Policy, offers: Sequence[Offer], request: RouteRequest) -> list[Offer]:
    """`offers` of one part, with their scores."""
    for offer, score in zip(offers, SCORES[policy](offers, request), strict=True):
        offer.score = score
    return list(offers)


def _random(offers: Sequence[Offer], request: RouteRequest) -> list[float]:
    return [0.0] * len(offers)


def _round_robin(offers: Sequence[Offer], request: RouteRequest) -> list[float]:
    """How many others come before it."""
    order = sorted(offer.worker.id for offer in offers)
    return [float((order.index(offer.worker.id) - request.number) % len(order)) for offer in offers]


def _least_loaded(offers: Sequence[Offer], request: RouteRequest) -> list[float]:
    return [
        float(worker.queued_prefill_tokens if part == "prefill" else worker.running + worker.waiting)
        for worker, part in ((offer.worker, offer.part) for offer in offers)
    ]


def _prefix_aware(offers: Sequence[Offer], request: RouteRequest) -> list[float]:
    return [float(request.prompt_tokens - offer.cached_tokens) for offer in offers]


def _cost(offers: Sequence[Offer], request: RouteRequest) -> list[float]:
    return [offer.cost_ms for offer in offers]


SCORES: Mapping[Policy, Scores] = {
    "random": _random,
    "round_robin": _round_robin,
    "least_loaded": _least_loaded,
    "prefix_aware": _prefix_aware,
    "cost": _cost,
}
