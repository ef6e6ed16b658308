"""The figures of the door's benchmark are what was measured."""

from tests.bench.door import Row, row, table


def test_a_row_has_the_middle_and_the_tail() -> None:
    measured = row("x", [n / 1e3 for n in range(1, 102)])
    assert (measured.name, round(measured.p50_ms, 6), round(measured.p99_ms, 6)) == ("x", 51.0, 100.0)


def test_ratios_are_to_the_first_row() -> None:
    lines = table([Row("nothing", 0.1, 0.2), Row("something", 0.15, 0.3)]).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["1.00", "1.50"]
