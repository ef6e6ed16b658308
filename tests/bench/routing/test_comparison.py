"""What is printed is what the runs said, paired by seed."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench.routing.comparison import compare, worse_than_best
from tests.bench.routing.experiment import Done, Experiment, Plan, Run
from tests.bench.routing.report import gateway_lines, print_comparison, write_json
from tests.bench.routing.simulation import ClusterSpec, Outcome

OUTCOME = Outcome(
    ttft_s=[1.0, 3.0],
    tpot_s=[0.02],
    hit_rate=0.5,
    fetched_share=0.1,
    alone_share=0.0,
    retries=0,
    prefill_busy_s=[10.0, 30.0],
    duration_s=40.0,
    ttft_error=0.1,
)


def done(policy: str, seed: int, slower: float = 1.0, gateways: int = 1) -> Done:
    run = Run(trace="t", load="high", policy=policy, seed=seed, rate=1.0, gateways=gateways)  # type: ignore[arg-type]
    return Done(run, replace(OUTCOME, ttft_s=[seed * slower * one for one in OUTCOME.ttft_s]))


def test_policies_are_compared_seed_by_seed() -> None:
    seeds = (1, 20, 300)
    rows = compare([done(p, s, f) for s in seeds for p, f in (("cost", 1.0), ("random", 1.5), ("slow", 0.9))])
    cost, random_row, other = rows
    assert (cost.policy, cost.ttft_ratio.value, cost.mean_ttft_s) == ("cost", 1.0, pytest.approx(2 * 107))
    assert random_row.ttft_ratio.low == pytest.approx(1.5)
    assert (cost.imbalance, cost.utilisation) == (1.5, 0.5)
    assert other.ttft_ratio.below_one
    assert [line.split(":")[1].split()[0] for line in worse_than_best(rows)] == ["slow", "slow"]  # mean, p99


def test_several_gateways_are_compared_with_one() -> None:
    rows = compare(
        [done("cost", 1), done("cost", 2), done("cost", 1, gateways=2), done("cost", 2, gateways=2)]
    )
    (line,) = gateway_lines(rows)
    assert line.startswith("2 gateways, t, high load: hit rate 50.0%, with one gateway 50.0% (+0.0%)")


def test_two_policies_over_a_small_trace_from_the_file_to_the_table(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = []
    for number in range(80):
        content = [
            0,
            rng.randrange(1, 6),
            *range(1000 * number + 10, 1000 * number + 10 + rng.randint(1, 30)),
        ]
        lines.append(
            {
                "timestamp": 3000 * (number // 3),
                "input_length": len(content) * 512 - 100,
                "output_length": rng.randint(20, 200),
                "hash_ids": content,
            }
        )
    (tmp_path / "mooncake_conversation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plan = Plan(
        data=tmp_path,
        traces=("mooncake",),
        policies=("cost", "random"),
        loads=("high",),
        seeds=(1, 2),
        requests=50,
        warm_up=10,
        gateways=2,
        spec=ClusterSpec(prefill=2, decode=2, blocks=600),
    )
    with Experiment(plan, processes=1) as experiment:
        results = list(experiment.results())
        assert len(results) == experiment.size == 6
    rows = compare(results)
    assert [(row.policy, row.gateways, row.seeds) for row in rows] == [
        ("cost", 1, 2),
        ("random", 1, 2),
        ("cost", 2, 2),
    ]
    assert all(len(result.outcome.ttft_s) == 40 for result in results)
    printed = io.StringIO()
    print_comparison(rows, Console(file=printed, width=200))
    assert "mooncake" in printed.getvalue()
    write_json(rows, {}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["rows"][1]["policy"] == "random"
