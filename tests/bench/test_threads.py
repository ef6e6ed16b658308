"""The pure parts of the benchmark of threads."""

from tests.bench.threads import BLOCKS, CONTEXT, block_tables, prompt, quantile


def test_a_quantile_is_one_of_the_times_and_no_more_are_above_it_than_may_be() -> None:
    times = [float(time) for time in range(100, 0, -1)]
    assert [quantile(times, share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1, 1, 50, 99, 100]
    assert quantile([7.0], 0.99) == 7.0


def test_sequences_have_blocks_of_their_own() -> None:
    used = [block for table in block_tables(32) for block in table]
    assert len(used) == len(set(used)) == 32 * CONTEXT // 16
    assert max(used) < BLOCKS


def test_only_the_last_chunk_of_a_prompt_gives_a_token() -> None:
    rows = [row for chunk in prompt() for row in chunk]
    assert sum(len(row.tokens) for row in rows) == CONTEXT
    assert [bool(row.samples) for row in rows] == [False, True]
