"""What an answer must match, compiled against one model's tokenizer (llguidance).

A grammar is a text: llguidance's Lark, or its JSON with schemas inside. The gateway makes and tries it
(services/gateway/text/grammar.py), a worker follows it (services/engine/device/grammar.py). Both compile it
here, so that a worker can follow what a gateway has accepted.
"""

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from services.core.errors import BadRequest, ModelFileError
from services.model.tokenizer import Tokenizer

# A schema of so many characters compiles in about 50 ms.
GRAMMAR_CHARACTERS_MAX = 64 << 10
# For the thread that compiles: chains of rules are followed by recursion, and the longest that fit the
# characters need between 8 and 64 MiB.
STACK_BYTES = 256 << 20
_LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,  # for all expressions together: 0.1 s
    step_lexer_fuel=50_000,  # of one mask: a few milliseconds
    step_max_items=5_000,  # of one mask: an ambiguous grammar takes 15 ms for so many, 160 ms for 20,000
    max_lexer_states=50_000,  # of up to 2 kB, kept as long as the grammar
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarVocabulary(msgspec.Struct, frozen=True):
    """What grammars need to know of a model."""

    tokenizer: str  # as in tokenizer.json
    end_token_ids: list[int]
    size: int  # of the model, which may pad its tokenizer's

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int = 0) -> "GrammarVocabulary":
        ends = sorted(token for token in tokenizer.end_token_ids if token < tokenizer.vocab_size)
        return cls(tokenizer.backend.to_str(), ends, max(vocab_size, tokenizer.vocab_size))

    def load(self) -> LLTokenizer:
        """Takes a fraction of a second. Raises ModelFileError if llguidance does not know the kind of
        tokenizer."""
        try:
            return LLTokenizer(self.tokenizer, n_vocab=self.size, eos_token=self.end_token_ids or None)
        except ValueError as error:
            raise ModelFileError(f"answers of this model cannot follow a grammar: {error}") from None


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """At the grammar's beginning. Releases the GIL; needs a thread with STACK_BYTES.

    Raises BadRequest with what is wrong with the grammar.
    """
    if len(grammar) > 2 * GRAMMAR_CHARACTERS_MAX:  # as its text may be quoted in JSON
        raise BadRequest(f"it has {len(grammar)} characters; at most {GRAMMAR_CHARACTERS_MAX} are allowed")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise BadRequest(reason(matcher))
    return matcher


def reason(matcher: LLMatcher) -> str:
    """Why it cannot go on, in words for the author of the grammar."""
    error = matcher.get_error().removesuffix("\n<non-verbose/>")
    return "no text matches it" if error in ("", "NoExtensionBias") else error
