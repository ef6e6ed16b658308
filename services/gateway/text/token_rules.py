"""A request's rules for the tokens of its answer, as SamplingParams has them: ids within the vocabulary."""

import asyncio
from typing import TypedDict

from services.core.errors import BadRequest
from services.gateway.api.schema import GenerationRequest
from services.model.tokenizer import Tokenizer

_WORDS_AT_ONCE = 20  # tokenised on the event loop, in about a millisecond


class TokenRules(TypedDict):
    logit_bias: dict[int, float]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


async def token_rules(request: GenerationRequest, tokenizer: Tokenizer) -> TokenRules:
    """Raises BadRequest, naming the parameter."""
    if len(request.bad_words or ()) > _WORDS_AT_ONCE:
        return await asyncio.to_thread(_rules, request, tokenizer)
    return _rules(request, tokenizer)


def _rules(request: GenerationRequest, tokenizer: Tokenizer) -> TokenRules:
    allowed = tuple(request.allowed_token_ids or ())
    if allowed and max(allowed) >= tokenizer.vocab_size:
        raise _outside(str(max(allowed)), tokenizer, "allowed_token_ids")
    return TokenRules(
        logit_bias=_bias(request.logit_bias or {}, tokenizer),
        allowed_token_ids=allowed,
        bad_words=tuple(ids for word in request.bad_words or () for ids in _bad_word(word, tokenizer)),
    )


def _bias(given: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise BadRequest(
                f"{key[:40]!r} is not a token id: 'logit_bias' has token ids as keys.", "logit_bias"
            )
        if int(key) >= tokenizer.vocab_size:
            raise _outside(key, tokenizer, "logit_bias")
        bias[int(key)] = value
    return bias


def _bad_word(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """At the begin of a text and within it, as vLLM does (SamplingParams.update_from_tokenizer): the form
    with a space counts only where the space becomes a part of the first token."""
    first, spaced = (
        tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
    )
    if not first:
        raise BadRequest("A bad word has nothing but spaces.", "bad_words")
    forms = [first]
    if len(spaced) == len(first) and spaced[:1] != first[:1]:
        forms.append(spaced)
    return forms


def _outside(token_id: str, tokenizer: Tokenizer, param: str) -> BadRequest:
    return BadRequest(f"Token id {token_id} is outside the vocabulary of {tokenizer.vocab_size}.", param)
