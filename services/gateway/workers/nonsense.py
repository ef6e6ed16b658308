"""What a worker cannot have meant: found before it reaches the request, which then goes on elsewhere."""

import math

from services.core.logprobs import TOP_LOGPROBS_MAX, PromptLogprobs, TokenLogprobs
from services.gateway.workers.worker_client import DecodeEvent, OutputToken, PrefillResult, Sequence, Started

_NUMBER_BYTES = 4  # of a column of PromptLogprobs
_MS_MAX = 1e9  # no number at all is not within it either


def nonsense(sequence: Sequence, event: DecodeEvent | PrefillResult) -> str | None:
    """What is wrong with a worker's answer to `sequence`, if anything."""
    match event:
        case OutputToken():
            return _of_token(sequence, event)
        case Started():
            times = (event.queue_ms, event.transfer_ms, event.exposed_ms, event.fetch_ms)
            return _of_numbers(sequence, (event.cached_tokens, event.fetched_tokens), times)
        case PrefillResult():
            return _of_prefill(sequence, event)
        case PromptLogprobs():
            return _of_prompt(sequence, event)
    return None


def _of_token(sequence: Sequence, token: OutputToken) -> str | None:
    if token.choice not in sequence.choices:
        return f"a token of choice {token.choice}"
    if not len(sequence.output_ids) <= token.index < sequence.sampling.max_tokens or token.token < 0:
        return f"token {token.token} at {token.index}"
    if token.finish is None and token.index + 1 == sequence.sampling.max_tokens:
        return "a last token without a finish"
    return None if token.logprobs is None else _of_logprobs(token.logprobs)


def _of_logprobs(logprobs: TokenLogprobs) -> str | None:
    best = logprobs.top_ids
    fits = len(best) == len(logprobs.top_logprobs) <= TOP_LOGPROBS_MAX and min(best, default=0) >= 0
    if not fits or any(map(math.isnan, (logprobs.logprob, *logprobs.top_logprobs))):
        return "logprobs that are none"
    return None


def _of_numbers(sequence: Sequence, tokens: tuple[int, ...], times_ms: tuple[float, ...]) -> str | None:
    if max(tokens) > sequence.known_tokens:
        return f"{max(tokens)} tokens cached of {sequence.known_tokens}"
    if not all(-_MS_MAX <= ms <= _MS_MAX for ms in times_ms):
        return "times that are none"
    return None


def _of_prefill(sequence: Sequence, result: PrefillResult) -> str | None:
    firsts = result.firsts
    if sorted(first.choice for first in firsts) != sorted(sequence.choices):
        return "other first tokens than it was asked for"
    if any(first.index != len(sequence.output_ids) for first in firsts):
        return "first tokens that are not the first"
    counts = (result.cached_tokens, result.fetched_tokens)
    times = (result.queue_ms, result.compute_ms, result.fetch_ms)
    parts = (*(_of_token(sequence, first) for first in firsts), _of_numbers(sequence, counts, times))
    scored = (_of_prompt(sequence, part) for part in result.prompt_logprobs)
    return next((found for found in (*parts, *scored) if found), None)


def _of_prompt(sequence: Sequence, part: PromptLogprobs) -> str | None:
    tokens, wanted = len(part), sequence.sampling.prompt_logprobs
    columns = (part.logprobs, part.ranks, part.top_ids, part.top_logprobs)
    lengths = (tokens, tokens, tokens * part.top, tokens * part.top)
    if any(len(column) != n * _NUMBER_BYTES for column, n in zip(columns, lengths, strict=True)):
        return "columns that do not fit each other"
    if wanted is None or part.top != wanted or not 1 <= part.first <= part.end <= len(sequence.prompt_ids):
        return "logprobs of tokens that the prompt does not have"
    return None
