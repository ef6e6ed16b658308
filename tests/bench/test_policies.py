"""The pure parts of the policies' benchmark: the load, and how figures are made and compared."""

from tests.bench.policies import POLICIES, Answered, Figures, Load, asks, in_turn, ratios

LOAD = Load(groups=4, prompts_each=5, prefix_tokens=32, tail_tokens=8, per_second=10.0)


def test_a_round_is_the_same_for_every_policy_and_differs_between_rounds() -> None:
    assert asks(LOAD, seed=1) == asks(LOAD, seed=1) != asks(LOAD, seed=2)


def test_prompts_of_a_group_have_the_prefix_in_common_and_nothing_else() -> None:
    prompts = [ask.prompt for ask in asks(LOAD, seed=1)]
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt in prompts:
        groups.setdefault(tuple(prompt[: LOAD.prefix_tokens]), []).append(prompt[LOAD.prefix_tokens :])
    assert [len(tails) for tails in groups.values()] == [LOAD.prompts_each] * LOAD.groups
    assert len({tuple(tail) for tails in groups.values() for tail in tails}) == len(prompts)


def test_requests_come_in_order_at_about_the_rate() -> None:
    times = [ask.at_s for ask in asks(Load(groups=50, prompts_each=20, per_second=10.0), seed=3)]
    assert times == sorted(times)
    assert 0.9 < len(times) / times[-1] / 10.0 < 1.1


def test_figures_are_of_all_answers_of_a_round() -> None:
    answered = [Answered(10.0, 100, 0), Answered(20.0, 100, 50), Answered(60.0, 200, 150)]
    assert Figures.of(answered) == Figures(30.0, 60.0, 0.5)


def test_every_policy_comes_first_in_turn() -> None:
    assert [in_turn(POLICIES, number)[0] for number in range(4)] == [*POLICIES, POLICIES[0]]
    assert sorted(in_turn(POLICIES, 5)) == sorted(POLICIES)


def test_ratios_are_of_rounds_side_by_side() -> None:
    found = {
        "cost": [Figures(50.0, 100.0, 0.8), Figures(90.0, 100.0, 0.6)],
        "random": [Figures(100.0, 100.0, 0.4), Figures(100.0, 200.0, 0.6)],
    }
    assert "mean 0.70 (0.50 to 0.90)" in ratios(found, "random")
    assert "p99 0.75 (0.50 to 1.00)" in ratios(found, "random")
    assert "hit rate 1.50 (1.00 to 2.00)" in ratios(found, "random")
