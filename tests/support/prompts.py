"""Sixty prompts of 1 to 1,500 tokens, the same in every run, from varied text."""

from pathlib import Path

from services.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LENGTH_MAX = 1500
# Around the borders of blocks (16 tokens) and of prefill chunks (128 tokens).
BORDERS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 1500)
COUNT = 60
SOURCES = ("LICENSE", "pyproject.toml", "services/core/errors.py", "proto/worker.proto", "kernels/ops.py")
UNICODE = (
    "Zwei Tafeln, ein Bild: das Diptychon. Ça coûte 12,50 €, n'est-ce pas ? 日本語の文章も、"
    "中文的句子也在这里。Привет, мир! Γειά σου Κόσμε. مرحبا بالعالم. 👩‍🚀🚀 ∑ x² ≤ ∞ "
    "– naïve façade, Ærøskøbing, Łódź. "
)


def prompt_lengths() -> list[int]:
    """COUNT lengths: the borders, and others spread evenly between 1 and LENGTH_MAX."""
    others = COUNT - len(BORDERS)
    spread = {round(LENGTH_MAX * (n + 0.5) / others) for n in range(others)}
    lengths = sorted({*BORDERS, *spread})
    assert len(lengths) == COUNT, "a spread length is a border too"
    return lengths


def build_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """One prompt of token ids for each length; each begins at another place of its text."""
    texts = [(ROOT / source).read_text() for source in SOURCES] + [UNICODE * 60]
    streams = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [_cut(streams[n % len(streams)], 97 * n, length) for n, length in enumerate(prompt_lengths())]


def _cut(stream: list[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; after the end it goes on at the beginning."""
    return [stream[(start + n) % len(stream)] for n in range(length)]
