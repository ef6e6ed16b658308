"""The prompt's text before the answers of a request that echoes, and where its tokens' texts begin in it."""

import asyncio
from collections.abc import Sequence

from services.core.errors import BadRequest
from services.gateway.api.schema import CompletionRequest, GenerationRequest
from services.gateway.text.detokenizer import Detokenizer, TokenBytes

# Logprobs of prompts in one answer: of 9,500 tokens with 20 more each. They are 60 bytes each as JSON.
SCORES_MAX = 200_000
# Of the tokens of an answer that is kept until it is whole: of 8,192 tokens with 20 more each, twice. They
# are about 70 bytes each in memory, and 60 more as JSON.
WHOLE_SCORES_MAX = 500_000
_TOKENS_AT_ONCE = 2_000  # decoded on the event loop, in about two milliseconds


def check_scores(
    request: GenerationRequest, prompts: Sequence[Sequence[int]], answer_tokens: Sequence[int]
) -> None:
    """Raises BadRequest if there could be too many logprobs of the prompts' tokens, or of the answers', which
    have so many tokens at most."""
    _check_prompts(request, prompts)
    top = request.top_logprobs_wanted
    if top is None or request.stream:
        return
    scores = sum(answer_tokens) * request.choices * (top + 1)
    if scores > WHOLE_SCORES_MAX:
        raise BadRequest(
            f"The answer could have {scores} logprobs, but this server gives at most {WHOLE_SCORES_MAX} in "
            f"one piece. Set '{request.max_tokens_param}', ask for fewer logprobs or answers, or stream.",
            request.max_tokens_param,
        )


def _check_prompts(request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    echoed_ones = request.top_logprobs_wanted if request.echoes else None
    shown = [top + 1 for top in (request.prompt_logprobs, echoed_ones) if top is not None]
    scores = sum(map(len, prompts)) * request.choices * sum(shown)
    if scores > SCORES_MAX:
        raise BadRequest(
            f"The prompt's tokens would have {scores} logprobs in the answer, but this server gives at most "
            f"{SCORES_MAX}. Ask for fewer logprobs, answers or tokens.",
            "logprobs" if request.prompt_logprobs is None else "prompt_logprobs",
        )


async def echoed(
    request: GenerationRequest, prompts: Sequence[Sequence[int]], token_bytes: TokenBytes
) -> list[str | None]:
    """The text of each prompt, as the client sent it; that of token ids with the special ones among them."""
    if not request.echoes or not isinstance(request, CompletionRequest):
        return [None] * len(prompts)
    given = list(zip(request.prompts, prompts, strict=True))

    def texts() -> list[str | None]:
        return [one if isinstance(one, str) else decoded(ids, token_bytes)[0] for one, ids in given]

    to_decode = sum(len(one) for one in request.prompts if not isinstance(one, str))
    return await asyncio.to_thread(texts) if to_decode > _TOKENS_AT_ONCE else texts()


def decoded(token_ids: Sequence[int], token_bytes: TokenBytes) -> tuple[str, list[int]]:
    """The text of tokens with the special ones among them, and where each begins in it."""
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=False)
    pieces, offsets, end = list[str](), list[int](), 0
    for token_id in token_ids:
        pieces.append(detokenizer.feed(token_id))
        offsets.append(end)
        end += len(pieces[-1])
    return "".join(pieces) + detokenizer.flush(), offsets


def offsets_in(text: str, token_ids: Sequence[int], token_bytes: TokenBytes) -> list[int]:
    """Where each token begins in a prompt's `text`. A tokenizer may put a special token before it, which has
    no text there."""
    whole, offsets = decoded(token_ids, token_bytes)
    added = len(whole) - len(text)
    return [min(max(offset - added, 0), len(text)) for offset in offsets]
