"""Our default model as a Hugging Face folder with float32 weights, for contestants that read nothing else."""

import copy
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.model.pull import ensure_default_model
from tests.bench.cpu.contestant import bench_home
from tests.bench.cpu.processes import PeerFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_TOLERANCE = 1e-4


def model_folder() -> Path:
    """config.json, the tokenizer and model.safetensors, of the GGUF file's weights. Written once, and proven:
    the folder's logits are those of the file. Raises PeerFailed."""
    folder = bench_home() / "models" / "SmolLM2-135M-Instruct.float32"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(ensure_default_model(), partial)
        partial.rename(folder)
    return folder


def _write(gguf: Path, folder: Path) -> None:
    # Imported here: it takes seconds, and the folder is nearly always there.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"our model is written to {folder.parent} as float32 safetensors (once)", file=sys.stderr)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    _plain(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(1_000, 1_064)[None]
    with torch.inference_mode():
        difference = (model(tokens).logits - written(tokens).logits).abs().max().item()
    if difference > LOGITS_TOLERANCE:
        raise PeerFailed(f"the model in {folder} is not that of {gguf}: logits differ by {difference:g}")


def _plain(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model without the mark of its quantised file, with which it does not let itself be saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain
