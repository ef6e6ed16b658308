"""What an answer must match, compiled against one model's tokenizer (llguidance).

A grammar is a text: llguidance's Lark, or its JSON with schemas inside. The gateway makes and tries it
(services/gateway/text/grammar.py), a worker follows it (services/engine/device/grammar.py). Both compile it
here, so that a worker can follow what a gateway has accepted.
"""

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
    step_max_items=20_000,
    max_lexer_states=50_000,  # of up to 2 kB, kept as long as the grammar
    max_grammar_size=100_000,
    verbose_errors=False,
)


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """`vocab_size`: of the model, which may pad its tokenizer's. Takes a fraction of a second.

    Raises ModelFileError if llguidance does not know this kind of tokenizer.
    """
    ends = sorted(token for token in tokenizer.end_token_ids if token < tokenizer.vocab_size)
    size = max(vocab_size, tokenizer.vocab_size)
    try:
        return LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=ends or None)
    except ValueError as error:
        raise ModelFileError(f"answers of this model cannot follow a grammar: {error}") from None


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """At the grammar's beginning. Releases the GIL. Raises BadRequest with what is wrong with the grammar."""
    if len(grammar) > GRAMMAR_CHARACTERS_MAX:
        raise BadRequest(f"it has {len(grammar)} characters; at most {GRAMMAR_CHARACTERS_MAX} are allowed")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise BadRequest(matcher.get_error())
    return matcher
