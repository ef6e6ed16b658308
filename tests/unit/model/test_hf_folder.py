import json

import numpy as np
import pytest
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, models, processors

from services.core.errors import BadRequest, ModelFileError
from services.model.chat_template import Chat
from services.model.files import open_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
}
WEIGHTS = save({"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((8, 8), np.float32)})
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _tokenizer_json() -> str:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<end>": 4}, merges=[]))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<end>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    return backend.to_str()


@pytest.fixture
def folder(write_folder):
    """folder(**files) -> a whole model folder with these files instead of, or besides, the usual ones."""
    usual = {
        "config.json": json.dumps(CONFIG),
        "model.safetensors": WEIGHTS,
        "tokenizer.json": _tokenizer_json(),
    }

    def make(changes=None):
        files = usual | {
            name: content if isinstance(content, str | bytes) else json.dumps(content)
            for name, content in (changes or {}).items()
            if content is not None
        }
        dropped = [name for name, content in (changes or {}).items() if content is None]
        return write_folder({name: content for name, content in files.items() if name not in dropped})

    return make


def test_a_folder_that_transformers_saved_in_shards_opens(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    model.save_pretrained(tmp_path / "tiny-llama", max_shard_size="8KB")
    opened = open_model(tmp_path / "tiny-llama")
    assert (opened.kind, opened.name, opened.config.layers) == ("folder", "tiny-llama", 2)
    assert opened.weight_files == sorted((tmp_path / "tiny-llama").glob("model-*.safetensors"))
    assert len(opened.weight_files) > 1


def test_a_snapshot_in_the_hugging_face_cache_has_the_models_name(folder, tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2"
    snapshot.parent.mkdir(parents=True)
    folder().rename(snapshot)
    assert open_model(snapshot).name == "Qwen3-0.6B"


def test_other_safetensors_beside_the_models_own_are_not_weights(folder):
    opened = open_model(folder({"consolidated.safetensors": WEIGHTS}))
    assert [file.name for file in opened.weight_files] == ["model.safetensors"]
    opened = open_model(folder({INDEX: {"weight_map": {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]}},
                                SHARDS[0]: WEIGHTS, SHARDS[1]: WEIGHTS}))  # fmt: skip
    assert [file.name for file in opened.weight_files] == list(SHARDS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config.json": None}, "config.json is missing"),
        ({"model.safetensors": None}, "model.safetensors is missing"),
        ({"model.safetensors": WEIGHTS[:-1]}, "model.safetensors is damaged or incomplete"),
        ({"model.safetensors": WEIGHTS[:40]}, "model.safetensors is damaged or incomplete"),
        ({"model.safetensors": b""}, "model.safetensors is damaged or incomplete"),
        ({"model.safetensors": b"\x02\0\0\0\0\0\0\0[]"}, "model.safetensors is damaged or incomplete"),
        ({INDEX: {"weight_map": {"a": SHARDS[0]}}}, f"{SHARDS[0]} is missing"),
        ({INDEX: {"weights": {}}}, f"{INDEX} does not hold"),
    ],
)
def test_a_missing_or_cut_file_is_named_with_the_remedy(folder, changes, named):
    with pytest.raises(ModelFileError) as caught:
        open_model(folder(changes))
    assert named in caught.value.message
    assert "ownload" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.json": None}, "tokenizer.json is missing"),
        ({"tokenizer.json": "{}"}, "tokenizer.json does not parse"),
        ({"tokenizer_config.json": "["}, "tokenizer_config.json does not hold"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "chat_template must be"),
        ({"generation_config.json": {"eos_token_id": "</s>"}}, "generation_config.json does not hold"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named_with_the_remedy(folder, changes, named):
    opened = open_model(folder(changes))
    with pytest.raises(ModelFileError) as caught:
        opened.tokenizer()
    assert named in caught.value.message
    assert "ownload" in caught.value.message


def test_the_training_limits_in_tokenizer_json_do_not_apply(folder):
    tokenizer = open_model(folder()).tokenizer()
    assert tokenizer.encode("abab", add_special_tokens=True) == [2, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {3}),
        ({"generation_config.json": {"eos_token_id": [4, 1]}}, {4, 1}),
        ({"generation_config.json": {"temperature": 0.6}}, {3}),
        ({"tokenizer_config.json": {"eos_token": {"content": "<end>"}}}, {3, 4}),
        ({"config.json": CONFIG | {"eos_token_id": None}}, set()),
    ],
)
def test_an_answer_ends_with_any_token_that_the_folder_names(folder, changes, expected):
    assert open_model(folder(changes)).tokenizer().end_token_ids == expected


TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config.json": {"bos_token": "<s>", "chat_template": TEMPLATE}},
        {"tokenizer_config.json": {"bos_token": {"content": "<s>"}, "chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]}},
        {"tokenizer_config.json": {"bos_token": "<s>", "chat_template": "old"},
         "chat_template.jinja": TEMPLATE},
    ],
    ids=["one template", "named templates", "a file wins"],
)  # fmt: skip
def test_the_chat_template_is_found_wherever_it_is_kept(folder, changes):
    template = open_model(folder(changes)).tokenizer().chat_template
    assert template.render(Chat(messages=[{"role": "user", "content": "hé"}])) == "<s>hé"


def test_a_folder_without_a_template_refuses_chats_only(folder):
    with pytest.raises(BadRequest):
        open_model(folder()).tokenizer().chat_template.render(Chat(messages=[]))


def test_the_revision_changes_with_the_weights_and_with_the_config(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    other = save({"lm_head.weight": np.zeros((8, 8), np.float32)})
    revisions = [
        open_model(folder(changes)).revision()
        for changes in ({}, {"model.safetensors": other}, {"config.json": CONFIG | {"rope_theta": 1e6}}, {})
    ]
    assert len(set(revisions)) == 3
    assert revisions[0] == revisions[3]
