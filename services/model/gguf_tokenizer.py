"""A tokenizer rebuilt from a GGUF file's metadata, which has no tokenizer.json.

`tokenizer.ggml.model` names the family: "gpt2" is byte-level BPE with merges, "llama" is SentencePiece
BPE with a score per piece and the UTF-8 bytes as its last resort.
"""

from collections.abc import Callable
from enum import IntEnum

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from services.core.errors import ModelFileError
from services.model.chat_template import ChatTemplate
from services.model.gguf_header import GgufHeader
from services.model.gguf_pre_tokenizers import CUTS
from services.model.sentencepiece_merges import merges_from_scores
from services.model.tokenizer import Tokenizer

_TEMPLATE_KEY = "tokenizer.chat_template"


class _TokenType(IntEnum):
    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4


class _Vocabulary(msgspec.Struct, frozen=True, rename=lambda name: f"tokenizer.ggml.{name}"):
    """The fields are named as in the file, without their prefix."""

    model: str
    tokens: list[str]
    pre: str = "default"
    token_type: list[int] = []
    merges: list[str] = []
    scores: list[float] = []
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None  # end of a turn, where it differs from the end of a text
    eom_token_id: int | None = None  # end of a message that calls a tool
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool | None = None
    add_space_prefix: bool = True

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @property
    def types(self) -> list[int]:
        return self.token_type or [_TokenType.NORMAL] * len(self.tokens)

    def of_type(self, wanted: _TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind == wanted]

    def text(self, token_id: int | None) -> str | None:
        return self.tokens[token_id] if token_id is not None and 0 <= token_id < len(self.tokens) else None


def gguf_tokenizer(header: GgufHeader) -> Tokenizer:
    """Raises ModelFileError, naming the file, for a tokenizer that is absent or not supported."""
    vocabulary = _vocabulary(header)
    if vocabulary.model not in _BUILDERS:
        raise _unsupported(header, f"tokenizer model {vocabulary.model!r}", list(_BUILDERS))
    if vocabulary.model == "gpt2" and vocabulary.pre not in CUTS:
        raise _unsupported(header, f"pre-tokenizer {vocabulary.pre!r}", list(CUTS))
    try:
        backend = _BUILDERS[vocabulary.model](vocabulary)
        _add_special_tokens(backend, vocabulary)
    except Exception as error:  # the Rust side raises bare Exception for merges outside the vocabulary
        raise ModelFileError(
            f"{header.path}: the parts of its vocabulary do not fit together ({error}). "
            "Delete it and download it again, or convert the model again."
        ) from error
    _add_bos(backend, vocabulary)
    ends = (vocabulary.eos_token_id, vocabulary.eot_token_id, vocabulary.eom_token_id)
    return Tokenizer(
        backend, frozenset(token for token in ends if token is not None), _chat_template(header, vocabulary)
    )


def _unsupported(header: GgufHeader, what: str, supported: list[str]) -> ModelFileError:
    return ModelFileError(
        f"{header.path} has {what}; supported are {', '.join(supported)}. "
        "Use the model's Hugging Face folder, which carries a tokenizer.json, or choose another model."
    )


def _vocabulary(header: GgufHeader) -> _Vocabulary:
    try:
        return msgspec.convert(header.metadata, _Vocabulary)
    except msgspec.ValidationError as error:
        raise ModelFileError(
            f"{header.path}: its metadata does not describe a tokenizer ({error}). Convert the model again."
        ) from error


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    cut = CUTS[vocabulary.pre]
    merges = [_pair(merge) for merge in vocabulary.merges]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=cut.whole_words)
    )
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = cut.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    merges = merges_from_scores({token: scores[token] for token in vocabulary.of_type(_TokenType.NORMAL)})
    unknown = vocabulary.unknown_token_id or 0
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=vocabulary.text(unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # A space is written "▁", and one is put before the text, so that its first word is a word like any other.
    prefix = [normalizers.Prepend("▁")] if vocabulary.add_space_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


_BUILDERS: dict[str, Callable[[_Vocabulary], tokenizers.Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _add_special_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    control, user_defined = (
        vocabulary.of_type(_TokenType.CONTROL),
        vocabulary.of_type(_TokenType.USER_DEFINED),
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _add_bos(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Puts BOS first where the model expects it. EOS is never added: a prompt is there to be continued."""
    add_bos = vocabulary.add_bos_token
    if add_bos is None:  # old files do not say; SentencePiece models and Llama 3 were trained with it
        add_bos = vocabulary.model == "llama" or CUTS[vocabulary.pre].bos
    bos = vocabulary.text(vocabulary.bos_token_id)
    if bos is not None and add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, vocabulary.bos_token_id)]
        )


def _chat_template(header: GgufHeader, vocabulary: _Vocabulary) -> ChatTemplate:
    """`tokenizer.chat_template` is the default; `tokenizer.chat_template.NAME` are the named ones."""
    named = f"{_TEMPLATE_KEY}."
    sources = {
        key.removeprefix(named): text for key, text in header.metadata.items() if key.startswith(named)
    }
    if _TEMPLATE_KEY in header.metadata:
        sources["default"] = header.metadata[_TEMPLATE_KEY]
    special = {
        "bos_token": vocabulary.text(vocabulary.bos_token_id),
        "eos_token": vocabulary.text(vocabulary.eos_token_id),
        "unk_token": vocabulary.text(vocabulary.unknown_token_id),
        "pad_token": vocabulary.text(vocabulary.padding_token_id),
    }
    return ChatTemplate(sources, {name: token for name, token in special.items() if token is not None})
