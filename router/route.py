"""Where a request goes: a pure function of a snapshot, explained by the offers it compared.

The cost of a pair is a sum of a part on P and a part on D, so the best pair is found without trying
all: take the best P and the best D; only when they are one worker must either be replaced.
"""

import random
from collections.abc import Mapping, Sequence

from router.cost import CostModel
from router.state import Offer, Route, RouteOptions, RouteRequest, WorkerView

Choice = tuple[Offer, ...]


def route(
    request: RouteRequest,
    cached_tokens: Mapping[str, int],
    workers: Sequence[WorkerView],
    options: RouteOptions,
    rng: random.Random,
) -> Route | None:
    """The cheapest way to serve `request`, or None when no worker can.

    `cached_tokens` maps worker ids to the prompt's leading tokens in their caches (absent: 0). Who
    computes the prompt may first fetch a prefix of it from another worker's cache. A
    request for one token goes to a prefill worker only, unless the split is "never". Workers without
    room for the prompt are taken only when all lack it.
    """
    not_excluded = [worker for worker in workers if worker.id not in request.excluded]
    usable = [worker for worker in not_excluded if worker.ready]
    lenders = [worker for worker in not_excluded if worker.lends]
    costs = CostModel.of(request, cached_tokens, usable, options, lenders)
    prefills = [] if options.split == "never" else _roomy([w for w in usable if w.prefills], request, 1)
    decodes = _roomy([w for w in usable if w.decodes], request, request.choices)
    prefill_offers = [costs.prefill(worker) for worker in prefills]
    if request.max_tokens == 1 and prefill_offers:
        return Route((_cheapest(prefill_offers, options, rng),), tuple(prefill_offers))
    decode_offers = [costs.decode(worker) for worker in decodes]
    pairs = _pairs(prefill_offers, decode_offers, request, options, rng)
    alone_offers = [costs.alone(worker) for worker in decodes]
    if pairs:
        alone_offers = [offer for offer in alone_offers if _may_be_alone(offer, costs)]
    choices = pairs + ([(_cheapest(alone_offers, options, rng),)] if alone_offers else [])
    if not choices:
        return None
    considered = (prefill_offers + decode_offers if pairs else []) + alone_offers
    return Route(_draw(choices, options, rng), tuple(considered))


def _may_be_alone(offer: Offer, costs: CostModel) -> bool:
    """Whether one worker alone competes with the pairs there are."""
    options = costs.options
    computed = costs.to_compute(offer.worker, offer.fetch)
    return options.split == "auto" and computed <= options.local_prefill_tokens_max


def _roomy(workers: list[WorkerView], request: RouteRequest, growing: int) -> list[WorkerView]:
    """Those that have blocks for the prompt and for `growing` sequences to grow into, or all if none has."""

    def needed(worker: WorkerView) -> int:
        return -(-request.prompt_tokens // worker.block_size) + growing

    return [w for w in workers if w.blocks_available >= needed(w)] or workers


def _pairs(
    prefills: Sequence[Offer],
    decodes: Sequence[Offer],
    request: RouteRequest,
    options: RouteOptions,
    rng: random.Random,
) -> list[Choice]:
    """The best pair of each group of compatible workers that has one."""
    groups = sorted({offer.worker.compatibility for offer in prefills})
    pairs: list[Choice] = []
    for group in groups:
        pairs += _best_pair(
            [offer for offer in prefills if offer.worker.compatibility == group],
            [offer for offer in decodes if offer.worker.compatibility == group],
            request,
            options,
            rng,
        )
    return pairs


def _best_pair(
    prefills: Sequence[Offer],
    decodes: Sequence[Offer],
    request: RouteRequest,
    options: RouteOptions,
    rng: random.Random,
) -> list[Choice]:
    """The cheapest pair of two different workers, or none.

    One of its halves is the cheapest of its kind, so choosing either half first and comparing the
    two results finds it. Where some pairs are to be avoided that need not be so: all are compared.
    """
    if request.apart:
        every = [(p, d) for p in prefills for d in decodes if p.worker.id != d.worker.id]
        every = [(p, d) for p, d in every if (p.worker.id, d.worker.id) not in request.apart]
        return [_draw(every, options, rng)] if every else []
    pairs: list[Choice] = []
    if prefills:
        prefill = _cheapest(prefills, options, rng)
        others = [offer for offer in decodes if offer.worker.id != prefill.worker.id]
        pairs += [(prefill, _cheapest(others, options, rng))] if others else []
    if decodes:
        decode = _cheapest(decodes, options, rng)
        others = [offer for offer in prefills if offer.worker.id != decode.worker.id]
        pairs += [(_cheapest(others, options, rng), decode)] if others else []
    return [_draw(pairs, options, rng)] if pairs else []


def _cheapest(offers: Sequence[Offer], options: RouteOptions, rng: random.Random) -> Offer:
    return _draw([(offer,) for offer in offers], options, rng)[0]


def _draw(choices: Sequence[Choice], options: RouteOptions, rng: random.Random) -> Choice:
    """One of the choices whose cost is within a near tie of the least."""
    costs = [sum(offer.cost_ms for offer in choice) for choice in choices]
    limit = min(costs) * (1 + options.near_tie)
    return rng.choice([choice for choice, cost in zip(choices, costs, strict=True) if cost <= limit])
