"""Text <-> token ids for one model, and what belongs to them."""

from collections.abc import Sequence

import tokenizers

from services.core.errors import BadRequest
from services.model.chat_template import ChatTemplate


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a server must know besides: end tokens and chat template."""

    def __init__(
        self, backend: tokenizers.Tokenizer, end_token_ids: frozenset[int], chat_template: ChatTemplate
    ) -> None:
        backend.no_truncation()  # tokenizer.json may carry the limits of the model's training
        backend.no_padding()
        self.backend = backend  # for streaming decoders, which keep a state per answer
        self.end_token_ids = end_token_ids  # the model ends its answer with one of these; may be empty
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat_template
        # No token stands for a longer text. (Blanks that a tokenizer drops are not counted on.)
        self.token_characters_max = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Special tokens written out in `text` become their ids. A rendered chat has its own BOS, so
        it is encoded with `add_special_tokens=False`. Raises BadRequest for half of a surrogate pair.
        """
        try:
            # A batch of one, because `encode` holds the GIL: no other thread would run meanwhile. The fast
            # one leaves offsets out: half of the time, and of that for which the GIL is held at the end.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:  # what the Rust side says of a str that has no UTF-8 form
            raise BadRequest("The text holds half of a surrogate pair. Send valid Unicode.") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Ids beyond the vocabulary, which a padded embedding can sample, decode to nothing."""
        # A batch of one for the same reason.
        return self.backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
