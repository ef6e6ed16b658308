"""The merges of a SentencePiece BPE model, which GGUF stores only as a score per piece.

SentencePiece joins, again and again, the two neighbours whose joined piece has the highest score
(https://github.com/google/sentencepiece, src/bpe_model.cc). BPE with merges joins the pair of lowest
rank. Ranking every way to cut a piece in two by that piece's score makes the two the same.
"""

from collections.abc import Mapping


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All (left, right) whose parts and whole are pieces, best whole first; `scores` is piece -> score.

    Ways to cut the same piece are ordered by their left part's score, then by their right part's.
    """
    ranked = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -scores[left], -scores[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
