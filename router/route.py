"""Where a request goes: a pure function of a snapshot, explained by the offers it compared.

The score of a pair is a sum of a part on P and a part on D, so the best pair is found without trying
all: take the best P and the best D; only when they are one worker must either be replaced.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from router.cost import CostModel
from router.policy import scored
from router.state import NOTHING, Offer, Route, RouteOptions, RouteRequest, WorkerView

Choice = tuple[Offer, ...]
Draw = Callable[[Sequence[Choice]], Choice]


def route(
    request: RouteRequest,
    cached_tokens: Mapping[str, int],
    workers: Sequence[WorkerView],
    options: RouteOptions,
    rng: random.Random,
    coming_tokens: Mapping[str, int] = NOTHING,
) -> Route | None:
    """The best way to serve `request` by `options.policy`, or None when no worker can.

    `cached_tokens` maps worker ids to the prompt's leading tokens in their caches (absent: 0), and
    `coming_tokens` to those that will be there once what waits there is computed. Who
    computes the prompt may first fetch a prefix of it from another worker's cache. A
    request for one token goes to a prefill worker only, unless the split is "never". Workers without
    room for the prompt are taken only when all lack it.
    """
    draw = partial(_draw, options=options, rng=rng)
    prefills, decodes, alone = _offers(request, cached_tokens, coming_tokens, workers, options)
    if request.max_tokens == 1 and prefills:
        return Route((_best(prefills, draw),), tuple(prefills), options.policy)
    pairs = _pairs(prefills, decodes, request, draw)
    if pairs:
        alone = alone if options.policy == "cost" and options.split == "auto" else []
    choices = pairs + ([(_best(alone, draw),)] if alone else [])
    if not choices:
        return None
    considered = (prefills + decodes if pairs else []) + alone
    return Route(draw(choices), tuple(considered), options.policy)


def _offers(
    request: RouteRequest,
    cached_tokens: Mapping[str, int],
    coming_tokens: Mapping[str, int],
    workers: Sequence[WorkerView],
    options: RouteOptions,
) -> tuple[list[Offer], list[Offer], list[Offer]]:
    """What those that may be used offer, scored by the policy: to prefill, to decode, to do both alone."""
    not_excluded = [worker for worker in workers if worker.id not in request.excluded]
    usable = [worker for worker in not_excluded if worker.ready]
    lenders = [worker for worker in not_excluded if worker.lends]
    costs = CostModel.of(request, cached_tokens, usable, options, lenders, coming_tokens)
    prefills = [] if options.split == "never" else _roomy([w for w in usable if w.prefills], request, 1)
    decodes = _roomy([w for w in usable if w.decodes], request, request.choices)
    return (
        scored(options.policy, [costs.prefill(worker) for worker in prefills], request),
        scored(options.policy, [costs.decode(worker) for worker in decodes], request),
        scored(options.policy, [costs.alone(worker) for worker in decodes], request),
    )


def _roomy(workers: list[WorkerView], request: RouteRequest, growing: int) -> list[WorkerView]:
    """Those that have blocks for the prompt and for `growing` sequences to grow into, or all if none has."""

    def needed(worker: WorkerView) -> int:
        return -(-request.prompt_tokens // worker.block_size) + growing

    return [w for w in workers if w.blocks_available >= needed(w)] or workers


def _pairs(
    prefills: Sequence[Offer], decodes: Sequence[Offer], request: RouteRequest, draw: Draw
) -> list[Choice]:
    """The best pair of each group of compatible workers that has one."""
    pairs: list[Choice] = []
    for group in sorted({offer.worker.compatibility for offer in prefills}):
        pairs += _best_pair(
            [offer for offer in prefills if offer.worker.compatibility == group],
            [offer for offer in decodes if offer.worker.compatibility == group],
            request,
            draw,
        )
    return pairs


def _best_pair(
    prefills: Sequence[Offer], decodes: Sequence[Offer], request: RouteRequest, draw: Draw
) -> list[Choice]:
    """The best pair of two different workers, or none.

    One of its halves is the best of its kind, so choosing either half first and comparing the
    two results finds it. Where some pairs are to be avoided that need not be so: all are compared.
    """
    if request.apart:
        every = [(p, d) for p in prefills for d in decodes if p.worker.id != d.worker.id]
        every = [(p, d) for p, d in every if (p.worker.id, d.worker.id) not in request.apart]
        return [draw(every)] if every else []
    pairs: list[Choice] = []
    if prefills:
        prefill = _best(prefills, draw)
        others = [offer for offer in decodes if offer.worker.id != prefill.worker.id]
        pairs += [(prefill, _best(others, draw))] if others else []
    if decodes:
        decode = _best(decodes, draw)
        others = [offer for offer in prefills if offer.worker.id != decode.worker.id]
        pairs += [(_best(others, draw), decode)] if others else []
    return [draw(pairs)] if pairs else []


def _best(offers: Sequence[Offer], draw: Draw) -> Offer:
    return draw([(offer,) for offer in offers])[0]


def _draw(choices: Sequence[Choice], options: RouteOptions, rng: random.Random) -> Choice:
    """One of the choices whose score is within a near tie of the least."""
    scores = [sum(offer.score for offer in choice) for choice in choices]
    limit = min(scores)
    if options.policy == "cost":
        limit += min(options.near_tie * limit, options.near_tie_ms)
    return rng.choice([choice for choice, score in zip(choices, scores, strict=True) if score <= limit])
