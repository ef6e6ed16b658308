"""From token events to text: what ends an answer, and what its last token contributes."""

from contextlib import aclosing

import pytest

from services.core.clock import ManualClock
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.choices import Choices
from services.gateway.path.journal import Journal
from services.gateway.text.answer import AnswerText, TextDelta, answer
from services.gateway.text.detokenizer import Detokenizer, TokenBytes
from services.gateway.text.stop import StopMatcher
from services.gateway.workers.worker_client import OutputToken


@pytest.fixture
def feed(tokenizer):
    """Feed the tokens of a text, ended by `finish`, to an AnswerText; gives its deltas."""

    def feed(
        text: str, finish: str = "length", *, stops=(), min_tokens: int = 0, ids=None
    ) -> list[TextDelta]:
        ids = tokenizer.encode(text, add_special_tokens=False) if ids is None else ids
        detokenizer = Detokenizer(TokenBytes(tokenizer.backend))
        answer_text = AnswerText(detokenizer, StopMatcher(stops), min_tokens)
        last = len(ids) - 1
        tokens = [OutputToken(n, token, finish if n == last else None) for n, token in enumerate(ids)]
        return [delta for token in tokens if (delta := answer_text.feed(token))]

    return feed


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_length_keeps_the_last_token_and_stop_drops_it(feed, tokenizer) -> None:
    assert text_of(feed("one two three", "length")) == "one two three"
    assert text_of(feed("one two three", "stop")) == "one two"


def test_text_held_for_a_stop_string_comes_out_at_the_end(feed) -> None:
    deltas = feed("wait for the EN", "length", stops=["END"])
    assert text_of(deltas) == "wait for the EN"
    assert deltas[-1].finish == "length"


def test_a_stop_string_in_the_last_token_wins_over_length(feed) -> None:
    deltas = feed("this is the END", "length", stops=["END"])
    assert text_of(deltas) == "this is the "
    assert deltas[-1].finish == "stop"


@pytest.mark.parametrize(("min_tokens", "text"), [(1, ""), (2, "a b "), (3, "a b "), (4, "a b a b ")])
def test_stop_strings_count_from_the_minimum_of_tokens_on(feed, min_tokens, text) -> None:
    deltas = feed("a b a b a b", stops=["a"], min_tokens=min_tokens)
    stopped = next(n for n, delta in enumerate(deltas) if delta.finish == "stop")
    assert text_of(deltas[: stopped + 1]) == text


def test_a_cut_character_becomes_a_replacement_at_the_end(feed, tokenizer) -> None:
    ids = tokenizer.encode("ok 👍", add_special_tokens=False)[:-1]
    assert text_of(feed("", ids=ids)) == "ok \ufffd"


async def test_the_workers_are_let_go_before_the_last_delta(tokenizer) -> None:
    closed = False

    async def events():
        nonlocal closed
        try:
            for index, token in enumerate(tokenizer.encode("a b c STOP d e f", add_special_tokens=False)):
                yield [OutputToken(index, token)]
        finally:
            closed = True

    journal = Journal(ManualClock(), GatewayMetrics(), 0.0)
    text = AnswerText(Detokenizer(TokenBytes(tokenizer.backend)), StopMatcher(["STOP"]), 0)
    journal._timeline.stage = "decoding"  # where an answer's tokens arrive
    async with aclosing(answer(events(), [text], Choices(1), journal)) as deltas:
        async for [delta] in deltas:
            assert closed == (delta.finish is not None)
    assert closed


async def test_tokens_that_cross_the_end_of_their_choice_are_not_counted(tokenizer) -> None:
    """Choices with attempts of their own: the worker of choice 0 has not heard yet of its stop string."""
    stop, other = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("STOP", "other"))

    async def events():
        for index in range(3):
            yield [OutputToken(index, stop, None if index < 2 else "length", choice=0)]
            yield [OutputToken(index, other, None if index < 2 else "length", choice=1)]

    journal = Journal(ManualClock(), GatewayMetrics(), 0.0)
    texts = [AnswerText(Detokenizer(TokenBytes(tokenizer.backend)), StopMatcher(["ST"]), 0) for _ in range(2)]
    async with aclosing(answer(events(), texts, choices := Choices(2), journal)) as deltas:
        finishes = [(d.choice, d.finish) async for burst in deltas for d in burst if d.finish]
    assert finishes == [(0, "stop"), (1, "length")]
    assert journal.usage.completion_tokens == 1 + 3
    assert not choices.goes_on(0)
