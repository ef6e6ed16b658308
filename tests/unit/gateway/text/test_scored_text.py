"""Logprobs beside the text: each token's once, never before its text, and with where it begins."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.logprobs import TokenLogprobs
from services.gateway.text.answer import AnswerText, ScoredText, TextDelta
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.stop import StopMatcher
from services.gateway.workers.worker_client import OutputToken

TEXTS = st.text(st.sampled_from("ab STOP👍é日"), min_size=1, max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abSTOP👍日 "), min_size=1, max_size=4), max_size=3)


def deltas_of(text: AnswerText, ids: list[int], finish: str | None) -> list[TextDelta]:
    result: list[TextDelta] = []
    for index, token in enumerate(ids):
        end = finish if index == len(ids) - 1 else None
        delta = text.feed(OutputToken(index, token, end, 0, TokenLogprobs(-float(index), 1)))
        result += [delta] if delta else []
        if delta and delta.finish:
            break
    return result


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, stops=STOPS, end=st.sampled_from(["length", "stop"]), shows_end=st.booleans())
def test_tokens_come_with_their_text_and_each_once(
    served_model, text: str, stops: list[str], end: str, shows_end: bool
) -> None:
    ids = served_model.tokenizer.encode(text, add_special_tokens=False)

    def subject(kind: type[AnswerText]) -> AnswerText:
        matcher = StopMatcher(stops, include=shows_end)
        return kind(Detokenizer(served_model.token_bytes), matcher, 0, shows_end=shows_end)

    scored = deltas_of(subject(ScoredText), ids, end)
    plain = deltas_of(subject(AnswerText), ids, end)
    assert [(d.text, d.finish, d.token_ids) for d in scored] == [
        (d.text, d.finish, d.token_ids) for d in plain
    ]
    tokens = [token for delta in scored for token in delta.tokens]
    fed = [token for delta in scored for token in delta.token_ids]
    assert [token.token_id for token in tokens] == fed
    assert [token.logprobs.logprob for token in tokens] == [-float(n) for n in range(len(fed))]
    shown, answer = 0, "".join(delta.text for delta in scored)
    for delta in scored:
        shown += len(delta.text)
        for token in delta.tokens:
            piece = served_model.token_bytes.of(token.token_id).decode(errors="ignore")
            if delta.finish is None:  # none of it is held back
                assert token.offset + len(piece) <= shown
                assert answer[token.offset :].startswith(piece)


def test_tokens_of_a_stop_string_and_the_end_token_are_among_them(served_model) -> None:
    ids = served_model.tokenizer.encode("one two STOP", add_special_tokens=False)
    text = ScoredText(Detokenizer(served_model.token_bytes), StopMatcher(["two STOP"]), 0)
    deltas = deltas_of(text, ids, None)
    assert "".join(delta.text for delta in deltas) == "one "
    assert [token.token_id for delta in deltas for token in delta.tokens] == ids
    text = ScoredText(Detokenizer(served_model.token_bytes), StopMatcher([]), 0, begin=10)
    deltas = deltas_of(text, [*ids, 2], "stop")
    last = [token for delta in deltas for token in delta.tokens][-1]
    assert (last.token_id, last.offset) == (2, 10 + len("one two STOP"))


def test_a_stop_string_or_stop_token_is_shown_where_that_is_wanted(served_model) -> None:
    ids = served_model.tokenizer.encode("one two STOP and more", add_special_tokens=False)

    def text(stops: list[str], *, skips: bool, finish: str | None) -> str:
        subject = AnswerText(
            Detokenizer(served_model.token_bytes, skip_special_tokens=skips),
            StopMatcher(stops, include=True),
            0,
            shows_end=True,
        )
        return "".join(delta.text for delta in deltas_of(subject, [*ids, 2], finish))

    assert text(["STO"], skips=True, finish=None) == "one two STO"
    assert text([], skips=False, finish="stop") == "one two STOP and more<|im_end|>"
    assert text([], skips=True, finish="stop") == "one two STOP and more"
