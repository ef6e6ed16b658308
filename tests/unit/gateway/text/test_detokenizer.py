"""Streamed text equals the text of all tokens at once, and no piece ever splits a character."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from services.core.errors import ModelFileError
from services.gateway.text.detokenizer import Detokenizer, TokenBytes
from services.model.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "naïve café – “quotes”",
    "日本語のテキスト、漢字とかな",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 tone",
    "a\ufffdb: a replacement character that is really there",
    "<|im_start|>user\nhi<|im_end|>",
    "\x00\x01 control \t tabs \r\n lines",
]


def pieces(token_bytes: TokenBytes, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes(tokenizer.backend)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_as_decoding_at_once_gives_them(tokenizer, token_bytes, text, skip) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = "".join(pieces(token_bytes, ids, skip_special_tokens=skip))
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS[:5])
def test_whole_characters_never_pass_through_a_replacement(tokenizer, token_bytes, text) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all("\ufffd" not in piece for piece in pieces(token_bytes, ids))


def test_a_character_that_is_complete_is_given_at_once(tokenizer, token_bytes) -> None:
    ids = tokenizer.encode("ab 漢字 👍", add_special_tokens=False)
    detokenizer, text = Detokenizer(token_bytes), ""
    for count, token in enumerate(ids, start=1):
        text += detokenizer.feed(token)
        assert text == tokenizer.decode(ids[:count], skip_special_tokens=True).rstrip("\ufffd")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_token_sequence_streams_to_what_decoding_at_once_gives(tokenizer, token_bytes, data, skip):
    # Ids of single bytes come first in the vocabulary: they make invalid UTF-8 likely. The last ones
    # are beyond it, as a padded embedding can sample them.
    ids = st.one_of(st.integers(0, 300), st.integers(0, tokenizer.vocab_size + 5))
    sequence = data.draw(st.lists(ids, max_size=30))
    streamed = "".join(pieces(token_bytes, sequence, skip_special_tokens=skip))
    assert streamed == tokenizer.decode(sequence, skip_special_tokens=skip)


def test_an_incomplete_character_at_the_end_becomes_a_replacement(tokenizer, token_bytes) -> None:
    ids = tokenizer.encode("👍", add_special_tokens=False)
    assert len(ids) > 1
    *before, last = pieces(token_bytes, ids[:-1])
    assert ("".join(before), last) == ("", "\ufffd")


def sentencepiece() -> tokenizers.Tokenizer:
    words = ["<unk>", "▁Hello", "▁world", "ly", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def byte_tokens(text: str) -> list[int]:
    return [5 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    "ids",
    [[1, 2, 3], [4, 4, 1], [1, *byte_tokens("é👍"), 2], byte_tokens(" x"), [2, 3, *byte_tokens("漢")], []],
)
def test_sentencepiece_tokens_stream_with_their_spaces_and_bytes(ids: list[int]) -> None:
    backend = sentencepiece()
    assert "".join(pieces(TokenBytes(backend), ids)) == backend.decode(ids)


def test_whole_characters_survive_beside_invalid_sentencepiece_bytes() -> None:
    backend = sentencepiece()
    ids = [*byte_tokens("é"), 5 + 0xFF, *byte_tokens("x")]
    assert "".join(pieces(TokenBytes(backend), ids)) == "é\ufffdx"
    assert backend.decode(ids) == "\ufffd" * 4


def test_an_unknown_decoder_is_refused_with_its_name() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelFileError, match="WordPiece"):
        TokenBytes(backend)


def test_special_tokens_that_are_kept_are_text(token_bytes, tokenizer) -> None:
    ids = tokenizer.encode("a<filename>b<reponame>", add_special_tokens=False)
    detokenizer = Detokenizer(token_bytes, kept=frozenset(ids[1:2]))
    assert "".join(map(detokenizer.feed, ids)) == "a<filename>b"
