"""How probable tokens are: natural logarithms, of the model's logits as they are.

They come before penalties, bias, masks and temperature, so they tell of the model, not of the request.
Numbers are float32, little-endian where they are bytes.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec

TOP_LOGPROBS_MAX = 20


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Of the token at one place, and of the most probable ones there, best first."""

    logprob: float
    rank: int  # of the token among all: 1 is the most probable
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Of the prompt's tokens at positions `first`, `first` + 1, ...; as columns, since there may be many.

    The prompt's first token has none: nothing comes before it.
    """

    first: int
    top: int  # entries in `top_ids` and `top_logprobs` for each token
    logprobs: bytes  # float32 [tokens]
    ranks: bytes  # int32 [tokens]
    top_ids: bytes = b""  # int32 [tokens, top]
    top_logprobs: bytes = b""  # float32 [tokens, top]

    @classmethod
    def of(cls, first: int, top: int, tokens: Sequence[TokenLogprobs]) -> "PromptLogprobs":
        """Each of `tokens` has `top` most probable ones."""
        return cls(
            first,
            top,
            _column("f", (token.logprob for token in tokens)),
            _column("i", (token.rank for token in tokens)),
            _column("i", (token_id for token in tokens for token_id in token.top_ids)),
            _column("f", (value for token in tokens for value in token.top_logprobs)),
        )

    def __len__(self) -> int:
        return len(self.logprobs) // 4

    @property
    def end(self) -> int:
        return self.first + len(self)

    def tokens(self) -> Iterator[TokenLogprobs]:
        """Of one token after the other. The columns fit each other, or it ends early."""
        ids = memoryview(self.top_ids).cast("i")
        values = memoryview(self.top_logprobs).cast("f")
        pairs = zip(memoryview(self.logprobs).cast("f"), memoryview(self.ranks).cast("i"), strict=False)
        for place, (logprob, rank) in enumerate(pairs):
            best = slice(place * self.top, (place + 1) * self.top)
            yield TokenLogprobs(logprob, rank, tuple(ids[best]), tuple(values[best]))


def _column(kind: str, values: Iterable[float]) -> bytes:
    return array(kind, values).tobytes()
