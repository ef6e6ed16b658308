"""transformers' generate, offline: one request at a time, greedy, no server and no client.

    python -m tests.bench.cpu.transformers_generate FOLDER PROMPTS ANSWER_TOKENS THREADS

PROMPTS is JSON; prints JSON: seconds of each request after one that warms up, and the memory.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.cpu.contestant import Family, Precision, Setting
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Cell
from tests.bench.cpu.model_folder import model_folder
from tests.bench.cpu.processes import ROOT, PeerFailed, last_words, memory_mib


@dataclass(frozen=True)
class TransformersGenerate:
    name: str = "transformers float32"
    family: Family = "transformers"
    precision: Precision = "float32"
    starts_slowly: bool = True

    @property
    def settings(self) -> Sequence[Setting]:
        cores = len(os.sched_getaffinity(0))
        return [Setting(f"{threads} threads", (str(threads),)) for threads in dict.fromkeys((cores, 1))]

    def prepare(self) -> None:
        model_folder()

    def group(self, cell: Cell) -> Hashable:
        return cell

    @contextmanager
    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> Iterator["Generating"]:
        yield Generating(setting, log)


@dataclass(frozen=True, slots=True)
class Generating:
    """An Opened: a process for each repetition, which warms itself up."""

    setting: Setting
    log: Path

    @property
    def command(self) -> str:
        return f"model.generate(do_sample=False), torch.set_num_threads({self.setting.flags[0]})"

    def warm_up(self, cell: Cell) -> None:
        pass

    def measure(self, cell: Cell, repetition: str) -> Figures:
        command = [sys.executable, "-m", "tests.bench.cpu.transformers_generate", str(model_folder())]
        command += [json.dumps(cell.prompts(repetition)), str(cell.shape.answer_tokens), *self.setting.flags]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as errors:
            ended = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        if ended.returncode:
            raise PeerFailed(f"generate ended with {ended.returncode}\n{last_words(self.log)}")
        told = json.loads(ended.stdout)
        tokens = cell.requests * cell.shape.answer_tokens
        return Figures(
            tokens_per_s=tokens / sum(told["seconds"]),
            requests=cell.requests,
            memory_mib=told["memory_mib"],
        )


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, prompts, answer_tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(prompt: Sequence[int], tokens: int) -> float:
        ids = torch.tensor([prompt])
        begun = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert made.shape[1] == len(prompt) + tokens
        return time.perf_counter() - begun

    asked = json.loads(prompts)
    answer(asked[0][::-1], 16)
    seconds = [answer(prompt, int(answer_tokens)) for prompt in asked]
    print(json.dumps({"seconds": seconds, "memory_mib": memory_mib([os.getpid()])}))


if __name__ == "__main__":
    main()
