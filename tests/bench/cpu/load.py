"""What every contestant is asked: random tokens, so many in and so many out, so many requests at a time."""

import random
from dataclasses import dataclass

# Within every Llama-style vocabulary, and beyond its special tokens.
TOKEN_IDS = range(1_000, 40_000)


@dataclass(frozen=True, slots=True)
class Shape:
    prompt_tokens: int
    answer_tokens: int

    @classmethod
    def of(cls, name: str) -> "Shape":
        """From "256x64". Raises ValueError."""
        prompt, answer = map(int, name.split("x"))
        if min(prompt, answer) < 1:
            raise ValueError(f"{name!r} is no PROMPTxANSWER in tokens")
        return cls(prompt, answer)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.answer_tokens}"


# Of a repetition: the slowest peer known needs two thirds of it for 32 clients on two cores with AVX2.
LIMIT_S = 180.0

SHORT, LONG, HEADLINE = Shape(256, 64), Shape(1_024, 128), Shape(16, 128)


@dataclass(frozen=True, slots=True)
class Cell:
    """One load: `concurrency` clients, each of whom asks one request after the other."""

    shape: Shape
    concurrency: int
    requests: int
    limit_s: float  # what is not answered then counts as failed

    def prompts(self, repetition: str) -> list[list[int]]:
        """The same for every contestant, and for no two repetitions: a prefix cache helps nobody."""
        rng = random.Random(f"{repetition}/{self.shape}/{self.concurrency}")
        return [rng.choices(TOKEN_IDS, k=self.shape.prompt_tokens) for _ in range(self.requests)]


def cell(shape: Shape, concurrency: int, quick: bool) -> Cell:
    """Two requests for each client, so that prompts meet decoding; of long ones one. A lone client asks more,
    because its figures are means over requests."""
    if quick or shape.prompt_tokens > SHORT.prompt_tokens:
        return Cell(shape, concurrency, requests=max(3, concurrency), limit_s=LIMIT_S)
    return Cell(shape, concurrency, requests=max(8, 2 * concurrency), limit_s=LIMIT_S)
