"""The pure parts of the index's benchmark."""

import random

import pytest

from services.worker.publisher import BATCH_BLOCKS_MAX
from tests.bench.index import HEADER, Latency, batches, held_blocks, in_turn, row


def test_latency_is_the_median_and_the_value_that_one_in_a_hundred_exceeds():
    assert Latency.of([float(number) for number in range(200, 0, -1)]) == Latency(p50=101.0, p99=199.0)
    assert Latency.of([3.0]) == Latency(3.0, 3.0)


def test_a_common_beginning_is_held_by_all_and_the_whole_chain_by_one():
    held = held_blocks("common", 256, 100, random.Random(1))
    assert sorted(held) == [64] * 99 + [256]
    assert held_blocks("common", 256, 1, random.Random(1)) == [256]


def test_scattered_lengths_are_all_possible_ones():
    held = held_blocks("scattered", 16, 1_000, random.Random(1))
    assert set(held) == set(range(17))


def test_batches_are_as_large_as_a_workers_and_lose_nothing():
    hashes = [bytes([number % 256]) for number in range(2 * BATCH_BLOCKS_MAX + 1)]
    found = list(batches(hashes))
    assert [len(batch) for batch in found] == [BATCH_BLOCKS_MAX, BATCH_BLOCKS_MAX, 1]
    assert [block for batch in found for block in batch] == hashes


async def test_calls_are_made_in_turn():
    made = []

    async def call(name):
        made.append(name)

    latencies = await in_turn({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2)
    assert made == ["a", "b", "a", "b"]
    assert set(latencies) == {"a", "b"}


@pytest.mark.parametrize(
    ("p99_ms", "ping_ms", "remark"),
    [(0.9, 0.2, ""), (1.1, 0.2, "  over the aim"), (1.1, 0.9, "  busy machine")],
)
def test_a_row_shows_ratios_and_what_is_over_the_aim(p99_ms, ping_ms, remark):
    latencies = {"index": Latency(0.5, p99_ms), "ping": Latency(0.1, ping_ms), "before": Latency(1.0, 2.0)}
    per_s = {"index": (300.0, Latency(1.0, 2.0)), "before": (100.0, Latency(1.0, 2.0))}
    printed = row(f"{'common':9} {256:6,} {100:7}", latencies, per_s)
    times = ["0.50", f"{p99_ms:.2f}", f"{ping_ms:.2f}", "5.0x", "2.0x"]
    assert printed.split()[3:11] == [*times, "300", "2.00", "3.0x"]
    assert printed[len(HEADER.splitlines()[-1]) :] == remark


def test_a_cluster_has_no_layout_before():
    latencies = {"index": Latency(0.5, 0.6), "ping": Latency(0.1, 0.2)}
    assert row("label", latencies, {"index": (300.0, Latency(1.0, 2.0))}).split().count("-") == 2
