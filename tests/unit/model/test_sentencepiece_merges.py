from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from services.model.sentencepiece_merges import merges_from_scores

PIECES = ["▁", "a", "b", "c", "▁a", "bc", "ab", "▁ab", "abc", "▁abc", "ca", "cab"]
SCORES = {piece: float(-rank) for rank, piece in enumerate(PIECES)}


def _sentencepiece(text: str) -> list[str]:
    """The definition: join the neighbours whose joined piece scores best, the leftmost on a tie."""
    symbols = list(text)
    while True:
        joined = [(SCORES.get(symbols[i] + symbols[i + 1]), -i) for i in range(len(symbols) - 1)]
        possible = [(score, place) for score, place in joined if score is not None]
        if not possible:
            return symbols
        at = -max(possible)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@given(st.text("▁abc", max_size=30))
def test_bpe_with_these_merges_cuts_text_as_sentencepiece_does(text):
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges_from_scores(SCORES)))
    assert bpe.encode(text).tokens == _sentencepiece(text)


def test_every_cut_of_a_piece_into_pieces_is_a_merge_best_piece_first():
    assert merges_from_scores({"a": -1.0, "b": -2.0, "ab": -3.0, "bb": -4.0, "abb": -5.0}) == [
        ("a", "b"),
        ("b", "b"),
        ("a", "bb"),
        ("ab", "b"),
    ]
