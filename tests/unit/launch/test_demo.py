"""The demo succeeds only if it showed what it is about."""

from io import StringIO

import pytest
from rich.console import Console

from services.core.errors import WorkerLost
from services.launch.demo import Turn, check, timings_table

SPLIT = {"prefill_worker": "prefill-0", "decode_worker": "decode-0"}
FIRST = Turn("Paris.", {**SPLIT, "total": 12.34, "cached_tokens_prefill": 0, "cached_tokens_decode": 0})
SECOND = Turn("Art.", {**SPLIT, "total": 5.0, "cached_tokens_prefill": 32, "cached_tokens_decode": 32})


def test_two_split_turns_with_a_prefix_hit_pass() -> None:
    check([FIRST, SECOND])


WRONG = {
    "no answer": ([Turn(" ", FIRST.timings), SECOND], "turn 1 brought no answer"),
    "no timings": ([FIRST, Turn("Art.", {})], "turn 2 did not go from"),
    "decode alone": (
        [Turn("Paris.", {**FIRST.timings, "prefill_worker": None}), SECOND],
        "turn 1 did not go",
    ),
    "one worker": ([FIRST, Turn("Art.", {**SPLIT, "prefill_worker": "decode-0"})], "turn 2 did not go"),
    "no prefix hit": ([FIRST, Turn("Art.", FIRST.timings)], "prefix cache"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_less_is_an_error(case: str) -> None:
    turns, message = WRONG[case]
    with pytest.raises(WorkerLost, match=message):
        check(turns)


def test_the_table_has_a_column_per_turn() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(timings_table([FIRST, SECOND]))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    total = next(line for line in lines if "total" in line)
    assert [cell.strip() for cell in total.strip("│").split("│")] == ["total", "12.3 ms", "5.0 ms"]
    cached = next(line for line in lines if "cached on the decode worker" in line)
    assert [cell.strip() for cell in cached.strip("│").split("│")][1:] == ["0 tokens", "32 tokens"]
