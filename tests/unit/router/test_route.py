"""The routing decision: properties on random clusters, and the rules one by one."""

import random
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.cost import CostModel
from router.policy import scored
from router.route import route
from router.state import Policy, RouteOptions, RouteRequest, WorkerView
from router.step_model import StepModel

EXACT = RouteOptions(near_tie=0.0)
PAIRS = replace(EXACT, split="always")
LOADS = ("queued_prefill_tokens", "queued_prefill_context", "running", "running_context", "waiting")


def speed(token=1.0, sequence=2.0, step=0.0, **others) -> StepModel:
    return StepModel(step=step, token=token, sequence=sequence, **others)


def worker(id, role="both", **changes) -> WorkerView:
    values = {"blocks_available": 10_000, "model": speed(), **changes}
    return WorkerView(
        id=id, prefills=role in ("prefill", "both"), decodes=role in ("decode", "both"), **values
    )


def choose(workers, *, prompt=500, max_tokens=10, choices=1, excluded=(), cached=None, options=EXACT, seed=0):
    request = RouteRequest(
        prompt_tokens=prompt, max_tokens=max_tokens, choices=choices, excluded=frozenset(excluded)
    )
    return route(request, cached or {}, workers, options, random.Random(seed))


def places(chosen):
    return None if chosen is None else (chosen.prefill, chosen.decode)


coefficients = st.just(0.0) | st.floats(0.001, 10)
step_models = st.builds(
    StepModel,
    step=st.floats(0, 100),
    token=coefficients,
    token_context=st.floats(0, 0.01),
    sequence=coefficients,
    context=st.floats(0, 0.01),
)


@st.composite
def clusters(draw):
    """Up to six workers of any role, speed, load and compatibility; some not ready."""
    count = draw(st.integers(0, 6))
    return [
        worker(
            f"w{number}",
            draw(st.sampled_from(["prefill", "decode", "both"])),
            ready=draw(st.sampled_from([True, True, True, False])),
            lends=draw(st.sampled_from([True, True, True, False])),
            compatibility=draw(st.sampled_from(["old", "new"])),
            queued_prefill_tokens=draw(st.integers(0, 5_000)),
            queued_prefill_context=draw(st.integers(0, 500_000)),
            running_context=draw(st.integers(0, 50_000)),
            running=draw(st.integers(0, 50)),
            waiting=draw(st.integers(0, 5)),
            blocks_available=draw(st.integers(0, 300)),
            model=draw(st.none() | step_models),
        )
        for number in range(count)
    ]


requests = st.builds(
    RouteRequest,
    prompt_tokens=st.integers(1, 3_000),
    max_tokens=st.integers(1, 3),
    number=st.integers(0, 10),
    choices=st.sampled_from([1, 2, 100]),
    excluded=st.frozensets(st.sampled_from(["w0", "w1", "w2"]), max_size=2),
    apart=st.frozensets(st.tuples(*[st.sampled_from(["w0", "w1", "w2", "w3"])] * 2), max_size=3),
)
cached_tokens = st.dictionaries(st.sampled_from([f"w{number}" for number in range(6)]), st.integers(0, 3_000))
options = st.builds(
    RouteOptions,
    policy=st.sampled_from(get_args(Policy)),
    split=st.sampled_from(["auto", "always", "never"]),
    arrival_ms=st.floats(10, 100_000),
    behind=st.floats(0, 5),
    interference=st.floats(0, 5),
)
seeds = st.integers(0, 2**32)


def legal_choices(request, cached, workers, options):
    """All that the rules allow, as lists of offers, written out without any search."""
    usable = [w for w in workers if w.ready and w.id not in request.excluded]
    lenders = [w for w in workers if w.lends and w.id not in request.excluded]
    costs = CostModel.of(request, cached, usable, options, lenders)

    def roomy(some, growing):
        return [
            w for w in some if (w.blocks_available - growing) * w.block_size >= request.prompt_tokens
        ] or some

    prefills = roomy([w for w in usable if w.prefills], 1) if options.split != "never" else []
    decodes = roomy([w for w in usable if w.decodes], request.choices)
    prefills, decodes, alone = (
        scored(options.policy, [offer(worker) for worker in some], request)
        for offer, some in ((costs.prefill, prefills), (costs.decode, decodes), (costs.alone, decodes))
    )
    if prefills and request.max_tokens == 1:
        return [[p] for p in prefills]
    pairs = [
        [p, d]
        for p in prefills
        for d in decodes
        if p.worker.id != d.worker.id
        and p.worker.compatibility == d.worker.compatibility
        and (p.worker.id, d.worker.id) not in request.apart
    ]
    compared = options.policy == "cost" and options.split == "auto"
    return pairs + [[offer] for offer in alone if compared or not pairs]


def score(choice):
    return sum(offer.score for offer in choice)


class TestProperties:
    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_no_excluded_unready_or_incompatible_worker_is_chosen(
        self, request, cached, workers, options, seed
    ):
        chosen = route(request, cached, workers, options, random.Random(seed))
        assume(chosen is not None)
        views = [offer.worker for offer in chosen.chosen]
        assert all(view.ready and view.id not in request.excluded for view in views)
        assert len({view.compatibility for view in views}) == 1
        assert chosen.prefill != chosen.decode
        assert (chosen.prefill, chosen.decode) not in request.apart
        assert all(view.prefills for view in views if view.id == chosen.prefill)
        assert all(view.decodes for view in views if view.id == chosen.decode)

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_the_choice_is_the_best_that_the_rules_allow(self, request, cached, workers, options, seed):
        options = replace(options, near_tie=0.0)
        chosen = route(request, cached, workers, options, random.Random(seed))
        legal = legal_choices(request, cached, workers, options)
        if not legal:
            assert chosen is None
            return
        assert list(chosen.chosen) in legal
        assert score(chosen.chosen) == min(map(score, legal))

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_near_ties_cost_little(self, request, cached, workers, options, seed):
        """A half drawn within 5 %, in a pair drawn within 5 %, against others drawn within 5 %."""
        chosen = route(request, cached, workers, options, random.Random(seed))
        legal = legal_choices(request, cached, workers, options)
        assume(legal)
        assert score(chosen.chosen) <= min(map(score, legal)) * 1.05**3 * (1 + 1e-9)

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_a_seed_decides(self, request, cached, workers, options, seed):
        first, second = (route(request, cached, workers, options, random.Random(seed)) for _ in range(2))
        assert first == second

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_no_offer_fetches_from_a_worker_that_it_cannot_read(
        self, request, cached, workers, options, seed
    ):
        chosen = route(request, cached, workers, options, random.Random(seed))
        assume(chosen is not None)
        views = {view.id: view for view in workers}
        for offer in chosen.considered:
            if offer.fetch is None:
                continue
            source = views[offer.fetch.source]
            assert offer.part != "decode"
            assert source.id != offer.worker.id
            assert source.lends
            assert source.id not in request.excluded
            assert source.compatibility == offer.worker.compatibility

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_a_fetch_is_whole_blocks_that_the_source_has_and_leaves_a_token_to_compute(
        self, request, cached, workers, options, seed
    ):
        cached = {name: tokens // 16 * 16 for name, tokens in cached.items()}
        chosen = route(request, cached, workers, options, random.Random(seed))
        assume(chosen is not None)
        for offer in chosen.considered:
            if fetch := offer.fetch:
                assert fetch.tokens >= options.fetch_blocks_min * 16
                assert fetch.tokens % 16 == 0
                assert offer.ready_tokens <= cached[fetch.source]
                assert offer.ready_tokens < request.prompt_tokens

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_fetching_never_makes_the_best_route_worse(self, request, cached, workers, options, seed):
        options = replace(options, near_tie=0.0, policy="cost")
        having, lacking = (
            route(request, cached, workers, replace(options, fetch=fetch), random.Random(seed))
            for fetch in (True, False)
        )
        assert (having is None) == (lacking is None)
        assume(having is not None)
        assert having.cost_ms <= lacking.cost_ms

    @given(requests, cached_tokens, clusters(), options, st.data())
    def test_more_load_never_makes_a_worker_more_attractive(self, request, cached, workers, options, data):
        assume(workers)
        options = replace(options, near_tie=0.0)
        before = route(request, cached, workers, options, random.Random(0))
        assume(before is not None)
        loaded = data.draw(st.sampled_from([w for w in workers if w.id not in places(before)] or [None]))
        assume(loaded is not None)
        load = data.draw(st.sampled_from(LOADS))
        heavier = replace(loaded, **{load: getattr(loaded, load) + data.draw(st.integers(1, 1_000))})
        after = route(
            request, cached, [heavier if w is loaded else w for w in workers], options, random.Random(0)
        )
        # Exact ties may be drawn differently; the loaded worker must not win by becoming worse.
        assert loaded.id not in places(after) or score(after.chosen) == score(before.chosen)

    @given(requests, cached_tokens, clusters(), options, seeds)
    def test_each_route_lists_its_own_offers_first_among_its_reasons(
        self, request, cached, workers, options, seed
    ):
        chosen = route(request, cached, workers, options, random.Random(seed))
        assume(chosen is not None)
        assert all(offer in chosen.considered for offer in chosen.chosen)
        own = len(chosen.chosen)
        assert [line[0] for line in chosen.reasons] == ["*"] * own + [" "] * (len(chosen.considered) - own)


def test_what_is_near_is_bounded_in_milliseconds_too():
    def cluster(queued):
        return [
            worker("busy", "prefill", queued_prefill_tokens=queued),
            worker("idle", "prefill"),
            worker("d", "decode"),
        ]

    options = RouteOptions(split="always", near_tie=0.05, near_tie_ms=20.0)
    for queued, drawn in ((15, {"busy", "idle"}), (25, {"idle"})):
        routes = [choose(cluster(queued), prompt=5_000, options=options, seed=seed) for seed in range(20)]
        assert {chosen.prefill for chosen in routes} == drawn


class TestSplit:
    def test_a_long_prompt_is_split(self):
        assert places(choose([worker("p", "prefill"), worker("d", "decode")], prompt=1_000)) == ("p", "d")

    def test_a_short_prompt_stays_on_an_idle_decode_worker(self):
        assert places(choose([worker("p", "prefill"), worker("d", "decode")], prompt=64)) == (None, "d")

    def test_a_long_prompt_that_the_decode_worker_has_cached_stays_there(self):
        workers = [worker("p", "prefill"), worker("d", "decode")]
        assert places(choose(workers, prompt=500, cached={"d": 480})) == (None, "d")

    def test_a_short_prompt_leaves_a_busy_decode_worker_alone(self):
        workers = [worker("p", "prefill"), worker("d", "decode", running=20)]
        assert places(choose(workers, prompt=64)) == ("p", "d")

    def test_a_short_prompt_does_not_queue_behind_a_long_prefill(self):
        workers = [worker("p", "prefill", queued_prefill_tokens=5_000), worker("d", "decode", running=2)]
        assert places(choose(workers, prompt=64)) == (None, "d")

    def test_always_splits_what_auto_would_not(self):
        workers = [worker("p", "prefill", queued_prefill_tokens=5_000), worker("d", "decode")]
        options = replace(EXACT, split="always")
        assert places(choose(workers, prompt=1, options=options)) == ("p", "d")

    @pytest.mark.parametrize("max_tokens", [1, 10])
    def test_never_keeps_everything_on_the_decode_worker(self, max_tokens):
        workers = [worker("p", "prefill"), worker("d", "decode", running=20)]
        options = replace(EXACT, split="never")
        assert places(choose(workers, max_tokens=max_tokens, options=options)) == (None, "d")

    @pytest.mark.parametrize("split", ["auto", "always"])
    def test_a_single_token_needs_no_decode_worker(self, split):
        workers = [worker("p", "prefill"), worker("d", "decode")]
        chosen = choose(workers, prompt=5, max_tokens=1, options=replace(EXACT, split=split))
        assert places(chosen) == ("p", None)

    @pytest.mark.parametrize("split", ["auto", "always", "never"])
    @pytest.mark.parametrize("max_tokens", [1, 10])
    def test_without_a_prefill_worker_the_decode_worker_does_all(self, split, max_tokens):
        chosen = choose([worker("d", "decode")], max_tokens=max_tokens, options=replace(EXACT, split=split))
        assert places(chosen) == (None, "d")

    @pytest.mark.parametrize("split", ["auto", "always", "never"])
    def test_without_a_decode_worker_there_is_no_route(self, split):
        assert choose([worker("p", "prefill")], options=replace(EXACT, split=split)) is None

    def test_one_worker_of_both_roles_is_never_paired_with_itself(self):
        assert places(choose([worker("w")], options=replace(EXACT, split="always"))) == (None, "w")

    def test_two_workers_of_both_roles_serve_as_each_others_half(self):
        workers = [worker("a", queued_prefill_tokens=1_000), worker("b")]
        assert places(choose(workers, options=PAIRS)) == ("b", "a")

    def test_a_decode_worker_helps_with_long_prompts_when_prefill_workers_have_long_queues(self):
        def cluster(queued):
            return [worker("p", "prefill", queued_prefill_tokens=queued), worker("d", "decode", running=2)]

        assert places(choose(cluster(100))) == ("p", "d")
        assert places(choose(cluster(3_000))) == (None, "d")


class TestPolicies:
    WORKERS = (
        worker("p0", "prefill", queued_prefill_tokens=900),
        worker("p1", "prefill", queued_prefill_tokens=800, running=9),
        worker("d0", "decode", running=3, waiting=2),
        worker("d1", "decode", running=4, queued_prefill_tokens=5_000),
    )

    def choose(self, policy, seed=0, number=0, cached=None, **changes):
        request = RouteRequest(prompt_tokens=500, max_tokens=10, number=number)
        options = RouteOptions(policy=policy, fetch=False, **changes)
        return route(request, cached or {}, self.WORKERS, options, random.Random(seed))

    def test_round_robin_gives_each_worker_its_turn(self):
        turns = [places(self.choose("round_robin", number=number)) for number in range(4)]
        assert turns == [("p0", "d0"), ("p1", "d1")] * 2

    def test_random_takes_all_pairs_alike(self):
        pairs = Counter(places(self.choose("random", seed)) for seed in range(400))
        assert len(pairs) == 4
        assert min(pairs.values()) > 60  # 100 expected

    def test_least_loaded_looks_at_the_queue_of_prompts_and_at_decoding_sequences(self):
        assert places(self.choose("least_loaded", cached={"p0": 480, "d0": 480})) == ("p1", "d1")

    def test_prefix_aware_looks_at_the_caches_only(self):
        assert places(self.choose("prefix_aware", cached={"p0": 16, "d0": 16})) == ("p0", "d0")
        assert places(self.choose("prefix_aware", cached={"p1": 480, "d1": 16, "d0": 480})) == ("p1", "d0")

    @pytest.mark.parametrize("policy", get_args(Policy))
    def test_the_split_is_respected(self, policy):
        cached = {"d0": 499}  # by cost d0 would do the rest alone
        assert self.choose(policy, cached=cached, split="always").prefill is not None
        assert self.choose(policy, cached=cached, split="never").prefill is None
        assert (self.choose(policy, cached=cached).prefill is None) == (policy == "cost")

    def test_each_policy_explains_itself(self):
        first, second, *others = self.choose("least_loaded").reasons
        assert first == "* prefill on p1: 1300.0 ms (queue 800.0 + prefill 500.0), least_loaded 800"
        assert (
            second
            == "* decode on d1: 1307.0 ms (transfer 27.0 + decode 10.0 + interference 1270.0), least_loaded 4"
        )
        assert [line[0] for line in others] == [" "] * 2


class TestFetch:
    def test_a_cold_prefill_worker_fetches_instead_of_queueing_at_the_warm_one(self):
        workers = [
            worker("warm", "prefill", queued_prefill_tokens=1_000),
            worker("cold", "prefill"),
            worker("d", "decode"),
        ]
        chosen = choose(workers, cached={"warm": 400}, options=PAIRS)
        assert (chosen.prefill, chosen.computes.fetch.source, chosen.computes.fetch.tokens) == (
            "cold",
            "warm",
            400,
        )
        assert chosen.expected_ttft_ms == (20 + 400 * 0.05) + 100

    def test_the_prefill_worker_fetches_the_last_turns_from_the_decode_worker(self):
        workers = [worker("p", "prefill"), worker("d", "decode")]
        chosen = choose(workers, prompt=500, cached={"d": 320, "p": 64}, options=PAIRS)
        assert places(chosen) == ("p", "d")
        assert (chosen.computes.fetch.source, chosen.computes.fetch.tokens) == ("d", 256)
        assert choose(workers, prompt=500, cached={"d": 64, "p": 320}).computes.fetch is None

    def test_a_decode_worker_that_can_fetch_all_but_a_little_does_the_rest_alone(self):
        workers = [
            worker("p", "prefill", queued_prefill_tokens=5_000),
            worker("d1", "decode", waiting=100),
            worker("d2", "decode"),
        ]
        chosen = choose(workers, prompt=500, cached={"d1": 480})
        assert (places(chosen), chosen.computes.fetch.source) == ((None, "d2"), "d1")

    def test_few_blocks_are_not_worth_a_fetch(self):
        workers = [worker("p", "prefill", model=speed(100.0)), worker("d", "decode", running=9)]
        assert choose(workers, prompt=500, cached={"d": 63}, options=PAIRS).computes.fetch is None
        assert choose(workers, prompt=500, cached={"d": 64}, options=PAIRS).computes.fetch.tokens == 64

    def test_a_fast_model_computes_rather_than_fetches(self):
        def cluster(ms_per_token):
            return [worker("p", "prefill", model=speed(ms_per_token)), worker("d", "decode")]

        # 400 tokens arrive in 40 ms, which is three quarters of 400 * 0.1333 ms.
        assert choose(cluster(0.14), cached={"d": 400}).computes.fetch is not None
        assert choose(cluster(0.13), cached={"d": 400}).computes.fetch is None

    def test_the_last_token_of_a_prompt_is_never_fetched(self):
        workers = [worker("p", "prefill"), worker("d", "decode", running=9)]
        options = replace(EXACT, split="always")
        assert choose(workers, prompt=496, cached={"d": 496}, options=options).computes.fetch.tokens == 480
        assert choose(workers, prompt=497, cached={"d": 496}, options=options).computes.fetch.tokens == 496

    def test_a_draining_worker_lends_and_a_suspected_one_does_not(self):
        def cluster(lends):
            return [
                worker("gone", "prefill", ready=False, lends=lends),
                worker("p", "prefill"),
                worker("d", "decode"),
            ]

        assert choose(cluster(True), cached={"gone": 400}).computes.fetch.source == "gone"
        assert choose(cluster(False), cached={"gone": 400}).computes.fetch is None

    def test_of_two_equal_sources_the_idler_lends(self):
        workers = [
            worker("busy", "prefill", queued_prefill_tokens=900),
            worker("idle", "prefill", queued_prefill_tokens=800),
            worker("p", "prefill"),
            worker("d", "decode"),
        ]
        assert choose(workers, cached={"busy": 400, "idle": 400}).computes.fetch.source == "idle"

    def test_what_is_still_being_computed_cannot_be_fetched(self):
        workers = [
            worker("warm", "prefill", queued_prefill_tokens=1_000),
            worker("cold", "prefill"),
            worker("d", "decode"),
        ]
        request = RouteRequest(prompt_tokens=500, max_tokens=10)
        chosen = route(request, {"warm": 160}, workers, EXACT, random.Random(0), {"warm": 400})
        warm, cold = (
            next(offer for offer in chosen.considered if offer.worker.id == name) for name in ("warm", "cold")
        )
        assert (warm.cached_tokens, warm.fetch) == (400, None)
        assert (cold.cached_tokens, cold.fetch.tokens) == (0, 160)

    def test_a_single_token_may_be_fetched_for_too(self):
        workers = [worker("p", "prefill"), worker("d", "decode")]
        chosen = choose(workers, max_tokens=1, cached={"d": 400})
        assert (places(chosen), chosen.computes.fetch.source) == (("p", None), "d")


class TestChoice:
    def test_a_cached_prefix_attracts_until_the_queue_is_longer_than_the_work_it_saves(self):
        def cluster(queued):
            return [
                worker("warm", "prefill", queued_prefill_tokens=queued),
                worker("cold", "prefill"),
                worker("d", "decode"),
            ]

        alone = replace(EXACT, fetch=False)
        assert choose(cluster(399), cached={"warm": 400}, options=alone).prefill == "warm"
        assert choose(cluster(401), cached={"warm": 400}, options=alone).prefill == "cold"

    def test_a_prefix_that_is_being_computed_attracts_like_a_cached_one(self):
        workers = [
            worker("computing", "prefill", queued_prefill_tokens=399),
            worker("idle", "prefill"),
            worker("d", "decode"),
        ]
        request, options = RouteRequest(prompt_tokens=500, max_tokens=10), replace(EXACT, fetch=False)
        assert route(request, {}, workers, options, random.Random(0)).prefill == "idle"
        assert (
            route(request, {}, workers, options, random.Random(0), {"computing": 400}).prefill == "computing"
        )

    def test_the_more_prompts_wait_the_more_a_cached_prefix_attracts(self):
        """Both would give the first token at about the same time; who computes less delays others less."""

        def cluster(waiting):
            load = {"queued_prefill_tokens": 500, "waiting": waiting}
            return [
                worker("warm", "prefill", **{**load, "queued_prefill_tokens": 950}),
                worker("cold", "prefill", **load),
                worker("d", "decode"),
            ]

        options = replace(PAIRS, fetch=False)
        assert choose(cluster(0), cached={"warm": 400}, options=options).prefill == "cold"
        assert choose(cluster(3), cached={"warm": 400}, options=options).prefill == "warm"

    def test_a_decode_worker_beyond_its_target_is_avoided(self):
        workers = [
            worker("p", "prefill"),
            worker("slow", "decode", running=40, model=speed(sequence=2.0, step=20.0)),  # 102 ms, transfer 2
            worker("fast", "decode", running=30, model=speed(sequence=2.0, step=20.0)),  # 82 ms, transfer 27
        ]
        assert choose(workers, cached={"slow": 500}, options=PAIRS).decode == "fast"
        unaware = replace(PAIRS, over_target=0.0, interference=0.0)
        assert choose(workers, cached={"slow": 500}, options=unaware).decode == "slow"

    def test_a_decode_worker_that_has_the_prefix_is_preferred(self):
        workers = [worker("p", "prefill"), worker("d1", "decode"), worker("d2", "decode")]
        chosen = choose(workers, cached={"d2": 160, "p": 320})
        assert places(chosen) == ("p", "d2")
        assert [offer.cached_tokens for offer in chosen.chosen] == [320, 160]
        assert chosen.computes.fetch is None

    def test_a_decode_worker_without_room_is_left_out_while_another_has_it(self):
        workers = [
            worker("p", "prefill"),
            worker("full", "decode", blocks_available=32),  # the 500 tokens fit, nothing more
            worker("roomy", "decode", blocks_available=33, running=100),
        ]
        assert choose(workers).decode == "roomy"
        assert choose(workers[:2]).decode == "full"

    def test_only_who_decodes_needs_room_for_the_choices(self):
        workers = [
            worker("p", "prefill", blocks_available=33),
            worker("busy", "prefill", queued_prefill_tokens=100),
            worker("full", "decode", blocks_available=34),  # the 500 tokens fit, and two choices
            worker("roomy", "decode", blocks_available=35, running=100),
        ]
        assert places(choose(workers, choices=3)) == ("p", "roomy")

    def test_workers_of_two_versions_are_paired_within_their_version(self):
        workers = [
            worker("old-p", "prefill", compatibility="old"),
            worker("new-p", "prefill", compatibility="new", queued_prefill_tokens=500),
            worker("new-d", "decode", compatibility="new"),
        ]
        assert places(choose(workers, options=PAIRS)) == ("new-p", "new-d")
        assert places(choose([workers[0], workers[2]])) == (None, "new-d")

    def test_a_worker_without_measurements_is_taken_to_be_average(self):
        workers = [
            worker("fast", "prefill", model=speed(1.0), queued_prefill_tokens=2_000),
            worker("slow", "prefill", model=speed(3.0)),
            worker("new", "prefill", model=None),
            worker("d", "decode", model=None),
        ]
        chosen = choose(workers)
        assert (chosen.prefill, chosen.expected_ttft_ms) == ("new", 500 * 2.0)

    def test_before_any_measurement_the_assumed_speeds_give_a_route(self):
        chosen = choose([worker("p", "prefill", model=None), worker("d", "decode", model=None)])
        assert places(chosen) == ("p", "d")
        assert chosen.expected_ttft_ms == EXACT.assumed.prefill_ms(500)

    def test_time_to_first_token_is_queue_and_uncached_prefill(self):
        workers = [worker("p", "prefill", queued_prefill_tokens=70), worker("d", "decode")]
        assert choose(workers, cached={"p": 400}, options=PAIRS).expected_ttft_ms == 70 + 100

    def test_a_fully_cached_prompt_still_computes_one_token(self):
        assert choose([worker("d", "decode")], cached={"d": 500}).expected_ttft_ms == 1.0

    def test_a_hint_beyond_the_prompt_is_cut_to_it(self):
        chosen = choose([worker("d", "decode")], prompt=100, cached={"d": 4_000})
        assert chosen.chosen[0].cached_tokens == 100

    def test_equal_idle_workers_are_spread(self):
        workers = [worker(f"p{n}", "prefill") for n in range(4)] + [
            worker(f"d{n}", "decode") for n in range(4)
        ]
        rng = random.Random(0)
        request = RouteRequest(prompt_tokens=500, max_tokens=10)
        routes = [route(request, {}, workers, RouteOptions(split="always"), rng) for _ in range(400)]
        for count in (Counter(r.prefill for r in routes), Counter(r.decode for r in routes)):
            assert len(count) == 4
            assert min(count.values()) > 60  # 100 expected; a fair draw misses this once in 100,000

    def test_equal_idle_workers_of_both_roles_are_spread_over_all_pairs(self):
        rng = random.Random(0)
        request = RouteRequest(prompt_tokens=500, max_tokens=10)
        workers = [worker(f"w{n}") for n in range(3)]
        pairs = Counter(
            places(route(request, {}, workers, RouteOptions(split="always"), rng)) for _ in range(300)
        )
        assert len(pairs) == 6

    def test_reasons_show_the_numbers_of_a_fetch(self):
        workers = [worker("p", "prefill"), worker("d", "decode", running=5)]
        first, *_ = choose(workers, prompt=500, cached={"d": 400, "p": 80}).reasons
        assert first == (
            "* prefill on p: 136.0 ms (fetch 36.0 + prefill 100.0, 80 tokens cached, 320 fetched from d)"
        )

    def test_reasons_show_the_numbers(self):
        workers = [worker("p", "prefill", queued_prefill_tokens=70), worker("d", "decode")]
        first, second = choose(workers, cached={"p": 400}, options=PAIRS).reasons
        assert first == "* prefill on p: 170.0 ms (queue 70.0 + prefill 100.0, 400 tokens cached)"
        assert second == "* decode on d: 29.0 ms (transfer 27.0 + decode 2.0)"
