"""The default model's tokenizer, rebuilt from its GGUF file, against the one transformers rebuilds."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import BadRequest
from services.model.chat_template import Chat
from services.model.files import open_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n\n\n  indented\n\t\tcode",
    "def f(x: int) -> str:\n    return f'{x!r}'  # 100% of it\n",
    "don't can't I'll WE'VE it's 'quoted'",
    "3.14159 2024-11-23 1,000,000 ½ ² ٣ 0x7f",
    "naïve café Ångström ﬁ e\u0301 Straße",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 emoji",
    "\u200b\ufeff\x00\x7f\u00a0\u2028 control",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start",
    "<repo_name>a/b<file_sep>c.py<empty_output>",
    "a" * 1000,
    '{"json": [1, 2.5e-3, null, true]}',
    "https://example.org/a?b=c&d=%20#frag",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>2 & 2</b>?"}],
    [
        {"role": "user", "content": "one\n"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "3 😀 <|im_end|>"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(default_model):
    return open_model(default_model).tokenizer()


@pytest.fixture(scope="module")
def reference(default_model):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    # transformers does not know the pre-tokenizer "smollm" and takes GPT-2's. This is the published one.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return reference


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(tokenizer, reference, text):
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == reference.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_the_ids_and_the_text_of_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


# Some bytes, among them rare control characters, are not in this vocabulary: they are left out.
@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"]), max_size=200))
def test_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("generate", [True, False])
def test_chats_are_rendered_as_by_transformers(tokenizer, reference, messages, generate):
    rendered = tokenizer.chat_template.render(Chat(messages=messages, add_generation_prompt=generate))
    assert rendered == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert tokenizer.encode(rendered, add_special_tokens=False) == list(
        reference.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
    )


def test_a_run_of_spaces_before_a_digit_stays_whole_and_digits_stand_alone(tokenizer):
    assert tokenizer.backend.encode("x   42").tokens == ["x", "ĠĠĠ", "4", "2"]


def test_the_answer_ends_with_the_token_the_file_names(tokenizer):
    assert tokenizer.end_token_ids == {2}
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]
    assert tokenizer.vocab_size == 49152


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 7], skip_special_tokens=False) == ""


def test_other_threads_run_while_a_long_text_is_tokenised(tokenizer):
    starts, done, turns = threading.Event(), threading.Event(), 0

    def encode() -> None:
        starts.set()
        tokenizer.encode("word and more " * 50_000, add_special_tokens=False)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    starts.wait()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 2


def test_half_of_a_surrogate_pair_is_the_clients_error(tokenizer):
    with pytest.raises(BadRequest, match="surrogate"):
        tokenizer.encode("a\ud83d", add_special_tokens=False)


def test_variables_of_the_client_cannot_replace_the_messages(tokenizer):
    chat = Chat(messages=[{"role": "user", "content": "real"}], variables={"messages": []})
    rendered = tokenizer.chat_template.render(chat)
    assert "real" in rendered
