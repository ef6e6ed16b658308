"""Who is measured, and in which order.

Contestants that start quickly take turns: each round measures all of them once, and every second round goes
backwards, so that a minute of a busier machine hits everybody. One that starts slowly has all its rounds in
one turn, in the middle. Before that, settings are tried.
"""

from collections.abc import Sequence

from tests.bench.cpu.contestant import Contestant, Setting
from tests.bench.cpu.diptych import Diptych
from tests.bench.cpu.llama_cpp import LlamaCpp
from tests.bench.cpu.load import HEADLINE, LIMIT_S, LONG, Cell, Shape, cell
from tests.bench.cpu.results import TRIAL
from tests.bench.cpu.transformers_generate import TransformersGenerate
from tests.bench.cpu.visit import Visit
from tests.bench.cpu.vllm import Vllm, has_bfloat16

ROUNDS = 3
HEADLINE_CONCURRENCY = 32


def contestants() -> list[Contestant]:
    """Who is compared first: llama.cpp's tools make the files that others need."""
    return [
        LlamaCpp("Q4_1"),
        LlamaCpp("Q8_0"),
        LlamaCpp("F32"),
        LlamaCpp("Q4_0"),
        Vllm(),
        *([Vllm("bfloat16")] if has_bfloat16() else []),
        TransformersGenerate(),
        Diptych("1+1", "Q4_1"),
        Diptych("both", "Q4_1"),
        Diptych("both", "Q8_0"),
        Diptych("1+1", "float32"),
        Diptych("both", "float32"),
    ]


def cells_of(
    contestant: Contestant, shapes: Sequence[Shape], concurrencies: Sequence[int], quick: bool
) -> list[Cell]:
    """What of the asked is asked of this one. Long prompts are for everybody's fastest weights."""
    if isinstance(contestant, TransformersGenerate):
        return [Cell(HEADLINE, 1, requests=2, limit_s=0.0)] if HEADLINE in shapes else []
    cells = [cell(shape, c, quick) for shape in shapes if shape != HEADLINE for c in concurrencies]
    if contestant.precision != fastest(contestant):
        cells = [each for each in cells if each.shape != LONG]
    if HEADLINE in shapes and contestant.family == "Diptych" and contestant.precision == "4 bits":
        cells.append(Cell(HEADLINE, HEADLINE_CONCURRENCY, 2 * HEADLINE_CONCURRENCY, limit_s=LIMIT_S))
    return cells


def fastest(contestant: Contestant) -> str:
    return "float32" if contestant.family == "vLLM" else "4 bits"


def plan(
    chosen: Sequence[Contestant], shapes: Sequence[Shape], concurrencies: Sequence[int], quick: bool
) -> list[Visit]:
    cells = {c.name: cells_of(c, shapes, concurrencies, quick) for c in chosen}
    rounds = 1 if quick else ROUNDS
    first = {c.family: c for c in reversed(chosen)}
    trials = [] if quick else [v for c in chosen if first[c.family] is c for v in trials_of(c, cells[c.name])]
    visits: list[Visit] = []
    for number in range(1, rounds + 1):
        turn = [c for c in chosen if not c.starts_slowly]
        visits += [Visit(c, cells[c.name], [number]) for c in (turn if number % 2 else reversed(turn))]
        if number == (rounds + 1) // 2:
            slow = [c for c in chosen if c.starts_slowly]
            visits += [Visit(c, cells[c.name], range(1, rounds + 1)) for c in slow]
    return [visit for visit in [*trials, *visits] if visit.cells]


def trials_of(contestant: Contestant, cells: Sequence[Cell]) -> list[Visit]:
    """Each setting once, with the shortest prompts. Others of a family use what its first one found best."""
    shortest = min((each.shape.prompt_tokens for each in cells), default=0)
    tried = [each for each in cells if each.shape.prompt_tokens == shortest]
    settings: Sequence[Setting] = contestant.settings
    return [Visit(contestant, tried, [TRIAL], setting) for setting in settings] if len(settings) > 1 else []
