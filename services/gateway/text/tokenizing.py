"""Texts to tokens, beside the event loop where that takes long."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from services.core.errors import BadRequest
from services.model.tokenizer import Tokenizer

# Tokenising takes about a millisecond per 2,000 characters: longer prompts are tokenised in a thread, so that
# the streams of other requests go on meanwhile. The tokenizer's own code holds no lock of Python's.
THREAD_CHARACTERS_MIN = 2_000
THREADS_MAX = 2  # long prompts at once: the others wait, and the cores are for those who answer


@dataclass(frozen=True, slots=True)
class Tokenizing:
    tokenizer: Tokenizer
    _threads: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="tokenize")
    )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        def encoded() -> list[list[int]]:
            encode = self.tokenizer.encode
            return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

        # What a text costs besides its characters is that of fifty of them.
        characters = sum(map(len, texts)) + 50 * (len(texts) - 1)
        if characters <= THREAD_CHARACTERS_MIN:
            return encoded()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encoded)

    def characters_max(self, tokens: int) -> int:
        """A longer text has more than `tokens` tokens."""
        return self.tokenizer.token_characters_max * tokens

    def check_length(self, text: str, tokens_max: int, param: str) -> None:
        """Raises BadRequest for a text that needs no tokenising to see that it is too long."""
        characters_max = self.characters_max(tokens_max)
        if len(text) > characters_max:
            raise BadRequest(
                f"This model's maximum context length is {tokens_max} tokens, which no text of more than "
                f"{characters_max} characters is within; the prompt has {len(text)}. Shorten it.",
                param,
                "context_length_exceeded",
            )
