"""Folders of tiny random models with a tokenizer each, of both families; their vocabularies are padded.

Both models have two ends: </s> and <turn>.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from tests.unit.engine.device.tiny_models import SIZES

PADDED = 7  # rows of the embedding beyond the tokenizer's vocabulary
_SPECIAL = ["<unk>", "<s>", "</s>", "<turn>", "<call>"]
_CORPUS = ['{"name": "Ada", "age": 36}', "[true, false, null]", "yes no yesterday", "12.5 1999-12-31"] * 3


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *sorted(set("".join(_CORPUS)) - {" "}), "ye", "yes", "no", "▁n", "▁no", "tr", "true"]
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("▁", "n"), ("▁n", "o"), ("t", "r")]
    vocab = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def save_model(folder: Path, tokenizer: Tokenizer) -> Path:
    """Logits of about 1 to 3 apart: every token has a chance."""
    ends = [tokenizer.token_to_id(text) for text in ("</s>", "<turn>")]
    sizes: dict[str, Any] = {**SIZES, "vocab_size": tokenizer.get_vocab_size() + PADDED, "eos_token_id": ends}
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder
