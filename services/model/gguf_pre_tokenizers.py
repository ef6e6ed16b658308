"""How byte-level BPE cuts text before merging, by the name in a GGUF file's `tokenizer.ggml.pre`.

A wrong cut gives wrong ids silently, so a name that is not here is refused. To support one, add a row
with what the model's published tokenizer.json has.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Cut:
    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False  # text is composed (Unicode NFC) first
    whole_words: bool = False  # a word in the vocabulary is taken whole, even if no merges lead to it
    bos: bool = False  # BOS comes first, if the file does not say


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# Llama 3 and Qwen 2 differ in how many digits stay together.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = Cut(lambda: _split(_WORDS + r"\p{N}{1,3}" + _REST), whole_words=True, bos=True)
_QWEN2 = Cut(lambda: _split(_WORDS + r"\p{N}" + _REST), nfc=True)

CUTS: dict[str, Cut] = {
    "smollm": Cut(_smollm),
    "gpt-2": Cut(_gpt2),
    "default": Cut(_gpt2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
