"""Stop strings: the text ends before the first one, however the tokens cut it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.text.stop import StopMatcher

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        found = matcher.feed(piece)
        text += found.text
        if found.stopped:
            return text, True
    return text + matcher.flush(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The plain definition: the shortest beginning that ends with a stop string, without it."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(STOPS, TEXT)
def test_single_characters_end_where_the_definition_says(stops: list[str], text: str) -> None:
    assert run(stops, list(text)) == expected(stops, text)


@given(STOPS, TEXT, st.data())
def test_how_the_text_is_cut_makes_no_difference(stops: list[str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    borders = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert run(stops, pieces) == expected(stops, text)


@given(STOPS, TEXT)
def test_what_is_held_back_may_still_become_a_stop_string_and_nothing_more(stops, text) -> None:
    matcher, given_out = StopMatcher(stops), ""
    for end, character in enumerate(text, start=1):
        found = matcher.feed(character)
        given_out += found.text
        if found.stopped:
            return
        held = text[len(given_out) : end]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopMatcher([]).feed("anything").text == "anything"


def test_a_flush_gives_the_held_text_once() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the EN").text == "the "
    assert (matcher.flush(), matcher.flush()) == ("EN", "")
