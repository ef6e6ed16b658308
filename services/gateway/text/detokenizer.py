"""Token ids to text, one token at a time, never splitting a character.

`tokenizers.decoders.DecodeStream` decodes a growing window twice per token and gives nothing at all
while the bytes stay invalid, so a model that babbles bytes makes it quadratic and mute. Here each
token becomes its bytes once, and an incremental UTF-8 decoder does the rest: constant time per token.

Two families of tokenizers exist among the supported models. Byte-level BPE writes every byte as a
printable character (GPT-2's table); SentencePiece writes a space as U+2581 and rare bytes as <0x0A>.

For byte-level BPE the replacement characters are those of decoding everything at once. For
SentencePiece they differ where bytes are invalid: `tokenizers` replaces every byte of a run of byte
tokens that is not valid as a whole, and so loses the whole characters in it; here these are kept, and
only the invalid bytes are replaced.
"""

import codecs
import json
import re
from functools import cached_property

import tokenizers

from services.core.errors import ModelFileError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER = _byte_of_character()


class TokenBytes:
    """The bytes of each token of one tokenizer. Shared by all answers.

    Raises ModelFileError for a tokenizer whose decoder belongs to neither family.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        kinds = _decoder_kinds(backend.decoder)
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ModelFileError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported; "
                "use a model with a byte-level BPE or SentencePiece tokenizer"
            )
        self._byte_level = "ByteLevel" in kinds
        # SentencePiece puts a space before the first word, which decoding takes away again.
        self.strips_first_space = not self._byte_level and bool(kinds & {"Strip", "Metaspace"})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id beyond the vocabulary."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._encode(self._backend.id_to_token(token_id) or "")
        return known

    def _encode(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


class Detokenizer:
    """The text of one answer. Pieces concatenate to what decoding all ids at once gives, except that
    SentencePiece's whole characters survive beside invalid bytes (see the module's docstring).
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        *,
        skip_special_tokens: bool = True,
        kept: frozenset[int] = frozenset(),  # special tokens that are not skipped
    ) -> None:
        self._bytes = token_bytes
        self._skipped = token_bytes.special_ids - kept if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_next = token_bytes.strips_first_space

    def feed(self, token_id: int) -> str:
        """The characters that this token completes: often one word, sometimes nothing."""
        if token_id in self._skipped:
            return ""
        return self._stripped(self._utf8.decode(self._bytes.of(token_id)))

    def flush(self) -> str:
        """A character that stayed incomplete becomes U+FFFD."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


def _decoder_kinds(decoder: tokenizers.decoders.Decoder | None) -> set[str]:
    """The types of a decoder and of its parts. Its pickled state is its part of tokenizer.json."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    parts = [state, *state.get("decoders", [])]
    return {part["type"] for part in parts if "type" in part}
