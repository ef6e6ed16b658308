import json
import unicodedata

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from services.core.errors import ModelFileError
from services.model.chat_template import Chat
from services.model.files import open_model

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 2024; we've 1234567 reasons.",
    "def main(argument):\n    return [value for value in range(100)]  # comment\n",
    "naïve café über Straße — “quoted” text… 日本語 😀",
] * 5
TEXTS = [
    *CORPUS[:3],
    "THE DOG'S 98765 quick-brown  foxes!!\n\n\tvalue = 12",
    "   spaces   12   and\r\n\r\nlines",
    "<s>the</s> <tool>fox</tool>",
    "e\u0301 é \u00a0x ½²",
]
SPECIAL = ["<s>", "</s>", "<tool>"]


def _byte_level_metadata(pre: str) -> dict:
    """A vocabulary learned from the corpus, with two control tokens and one defined by the user."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + SPECIAL,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in learned["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


def _sentencepiece_metadata() -> dict:
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = sorted(learner.get_vocab(), key=learner.token_to_id)
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "<tool>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _both(path):
    from transformers import AutoTokenizer

    return open_model(path).tokenizer(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "llama3", "qwen2"])
def test_byte_level_ids_are_those_of_transformers(write_gguf, pre):
    ours, reference = _both(write_gguf(_byte_level_metadata(pre)))
    for text in TEXTS:
        # transformers leaves out the NFC normaliser of Qwen's published tokenizer.
        expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(expected, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == expected


def test_sentencepiece_ids_are_those_of_transformers(write_gguf):
    ours, reference = _both(write_gguf(_sentencepiece_metadata()))
    for text in [text for text in TEXTS if not text.startswith((" ", "<"))]:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == reference.encode(text)
        assert ids[0] == 1
        assert ours.decode(ids, skip_special_tokens=True) == text


def test_llama3_takes_a_known_word_whole_though_no_merge_leads_to_it(write_gguf):
    vocabulary = {
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "<s>"],
        "tokenizer.ggml.merges": ["a b"],
    }
    vocabulary |= {"tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3], "tokenizer.ggml.bos_token_id": 5}
    encoded = {}
    for pre in ("llama-bpe", "gpt-2"):
        tokenizer = open_model(write_gguf(vocabulary | {"tokenizer.ggml.pre": pre})).tokenizer()
        encoded[pre] = tokenizer.encode("abc", add_special_tokens=False)
    assert encoded == {"llama-bpe": [4], "gpt-2": [3, 2]}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, [3, 2]),
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "llama-bpe"}, [2]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [3, 2]),
        ({}, [2]),
    ],
    ids=["asked", "refused", "Llama 3 by default", "others not by default"],
)
def test_bos_comes_first_where_the_model_expects_it(write_gguf, metadata, expected):
    tokenizer = open_model(write_gguf(metadata)).tokenizer()
    assert tokenizer.encode("ab", add_special_tokens=True) == expected
    assert tokenizer.encode("ab", add_special_tokens=False) == [2]


def test_user_defined_tokens_stay_in_text_that_skips_special_ones(write_gguf):
    tokenizer = open_model(write_gguf(_byte_level_metadata("gpt-2"))).tokenizer()
    ids = tokenizer.encode("<s>fox<tool></s>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>fox<tool></s>"


def test_ends_of_text_of_turn_and_of_message_all_end_an_answer(write_gguf):
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 1}
    assert open_model(write_gguf(ends)).tokenizer().end_token_ids == {4, 3, 1}
    assert open_model(write_gguf({"tokenizer.ggml.eos_token_id": None})).tokenizer().end_token_ids == set()


def test_named_templates_and_special_tokens_reach_the_chat(write_gguf):
    templates = {
        "tokenizer.chat_template": "{{ bos_token }}plain",
        "tokenizer.chat_template.tool_use": "tools",
    }
    template = open_model(write_gguf(templates)).tokenizer().chat_template
    assert template.render(Chat(messages=[])) == "<s>plain"
    assert template.render(Chat(messages=[], tools=[{}])) == "tools"


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "Expected `str`"),
        ({"tokenizer.ggml.merges": ["a z"]}, "do not fit together"),
        ({"tokenizer.ggml.merges": ["ab"]}, "do not fit together"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "do not fit together"),
        ({"tokenizer.ggml.token_type": [1]}, "do not fit together"),
    ],
)
def test_a_tokenizer_that_would_give_wrong_ids_is_refused_by_name(write_gguf, metadata, named):
    path = write_gguf(metadata)
    with pytest.raises(ModelFileError) as caught:
        open_model(path).tokenizer()
    assert str(path) in caught.value.message
    assert named in caught.value.message
