"""lm-eval's local-completions gives the log-likelihoods that transformers gives, through both workers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from services.model.files import open_model
from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL
from tests.support.reference import Reference

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make setup`, or the extra `eval`")

CLOSE = 1e-2  # of a sequence
TASKS = {
    "capitals": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}
CAPITALS = ["Paris", "Rome", "Madrid"]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "capitals": [
        {
            "question": f"What is the capital of {land}?",
            "choices": ["Paris", "Rome", "Madrid"],
            "right": right,
        }
        for right, land in enumerate(("France", "Italy"))
    ],
    "perplexity": [
        {"text": "The sea is blue — and the sky above it, 日本 included, is bluer still. " * 3},
        {"text": "def add(a, b):\n    return a + b\n"},
    ],
}
WINDOW_TOKENS = 64  # the first text takes several


@pytest.fixture(scope="module")
def tokenizer_folder(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Hugging Face keeps tokenizers: lm-eval counts a context's tokens with it."""
    tokenizer = open_model(default_model).tokenizer()
    end = tokenizer.decode([min(tokenizer.end_token_ids)], skip_special_tokens=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=end).save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tasks, their documents in files beside them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, text in TASKS.items():
        file = tmp_path / f"{name}.json"
        file.write_text("\n".join(map(json.dumps, DOCUMENTS[name])))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return tmp_path


def test_log_likelihoods_are_those_of_transformers(
    exact_split: RunningCluster,
    reference: Reference,
    tokenizer_folder: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four requests at a time, of two prompts each."""
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{exact_split.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tokenizer_folder),
        max_length=WINDOW_TOKENS,
        num_concurrent=4,
        batch_size=2,
        max_retries=1,
    )
    evaluated = simple_evaluate(
        model=client,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for sample in evaluated["samples"]["capitals"]:
        expected = [_likelihood(reference, *client._encode_pair(*pair)) for pair in sample["arguments"]]
        assert [told for ((told, _greedy),) in sample["resps"]] == pytest.approx(expected, abs=CLOSE)
        right += expected.index(max(expected)) == sample["doc"]["right"]
    assert evaluated["results"]["capitals"]["acc,none"] == right / len(DOCUMENTS["capitals"]) > 0
    for sample in evaluated["samples"]["perplexity"]:
        ((text,),), ((told,),) = sample["arguments"], sample["resps"]
        assert told == pytest.approx(_rolling(reference, client, text), abs=CLOSE)


def _rolling(reference: Reference, client: Any, text: str) -> float:
    """In the windows that lm-eval documents: each token once, after at most a window of others."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=client.tok_encode(text),
        prefix_token=client.prefix_token_id,
        max_seq_len=client.max_length - 1,
        context_len=1,
    )
    return sum(_likelihood(reference, *make_disjoint_window(window)) for window in windows)


def _likelihood(reference: Reference, context_ids: Sequence[int], token_ids: Sequence[int]) -> float:
    """The logarithm of the probability that exactly these tokens follow the context."""
    logprobs = reference.logprobs([*context_ids, *token_ids])[-len(token_ids) :]
    return float(logprobs.gather(1, torch.tensor(list(token_ids))[:, None]).sum())
