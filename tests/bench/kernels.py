"""The C++ kernels with weights of 4 and 8 bits beside torch in float32, on the shapes of the default model.

    python -m tests.bench.kernels [--part linear|attention|sampling|steps|float32|logprobs|quality]
                                  [--threads N] [--rounds N] [--level avx512_vnni|avx_vnni|avx2|plain]

Both sides of a line run by turns, and the line shows the best time of each: other work on the machine only
ever adds time. Rates count the same operations for both (2 per weight and row; 4 per query, key and
dimension). `logprobs` has one step without and with them, `float32` a step by the kernels, by torch, and by
torch with `--compile`. `quality` runs both models over English text that Python ships (topics of `help()`)
and compares their distributions of each next token. `--level` is for linear, attention and sampling.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, cycle
from pydoc_data import topics
from typing import TypeVar

import torch
from torch import Tensor

from kernels import ops
from kernels.cpu.build import LEVELS, processor_level
from kernels.cpu.kernels import CpuKernels
from kernels.cpu.packed_weight import GROUP, Groups, PackedWeight, pack
from services.core.sampling import SamplingParams
from services.engine.device.batch import TOKENS_PER_GROUP_CPU
from services.engine.device.compiled_decoder import CompiledDecoder
from services.engine.device.decoder import Decoder
from services.engine.device.kernel_decoder import load_float_decoder
from services.engine.device.sampler import choose_with_kernels, choose_with_torch
from services.engine.device.torch_runner import Computation, TorchRunner
from services.engine.device.weights import TORCH_PACKING, load_weights
from services.engine.runner import Row, Sample, Targets
from services.model.config import ModelConfig
from services.model.files import ModelFiles, open_model
from services.model.home import diptych_home
from services.model.pull import ensure_default_model

T = TypeVar("T")
ROWS = (1, 8, 32, 128)
SEQUENCES = (1, 8, 32)
CONTEXT = 256  # tokens of each decoding sequence, and of a prompt
LONG = ((8, 1024), (2, 4096))  # sequences and tokens of each
BLOCK_SIZE = 16
BLOCKS = 1024
WINDOW = 512  # tokens of a piece of the text
CACHES_BYTES = 2**26  # more than the last-level cache that a core has for itself
GREEDY = Sample(SamplingParams(max_tokens=1, temperature=0), [], [])


def best_times(sides: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each side's fastest call; they run by turns, after one call each that is not counted."""
    for side in sides:
        side()
    best = [math.inf] * len(sides)
    for _ in range(rounds):
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near one model's next-token distributions are to another's."""

    tokens: int
    divergence: float  # mean KL divergence from the exact ones, nats
    exact_loss: float  # mean negative log likelihood of the text, nats
    near_loss: float
    agreement: float  # share of tokens with the same most probable next one

    @property
    def perplexity_change(self) -> float:
        return math.exp(self.near_loss - self.exact_loss) - 1


def closeness(pairs: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Closeness:
    """pairs: exact and near logits [tokens, vocab] and the ids [tokens] that came next."""
    tokens, divergence, exact_loss, near_loss, same = 0, 0.0, 0.0, 0.0, 0
    for exact, near, following in pairs:
        p, q = exact.double().log_softmax(-1), near.double().log_softmax(-1)
        places = torch.arange(len(following))
        tokens += len(following)
        divergence += float((p.exp() * (p - q)).sum())
        exact_loss -= float(p[places, following].sum())
        near_loss -= float(q[places, following].sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Closeness(tokens, divergence / tokens, exact_loss / tokens, near_loss / tokens, same / tokens)


class Bench:
    def __init__(self, threads: int, rounds: int, level: str) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self._threads = threads
        self._rounds = rounds
        self._files = open_model(ensure_default_model())
        self._kernels = CpuKernels(diptych_home() / "kernels", threads, level)

    def linear(self) -> None:
        print(f"\n{'projection':24s}{'rows':>5s}{'4 bits':>12s}{'8 bits':>26s}{'float32':>26s}{'ratios':>9s}")
        for name, (outputs, inputs) in _projections(self._files.config).items():
            weight = torch.randn(outputs, inputs)
            near = [_copies(pack(form)) for form in (_four_bits(weight), Groups.of(weight))]
            exact = [ops.pack_weight(weight) for _ in range(_copies_beyond_caches(weight.nbytes))]
            for rows in ROWS:
                self._project(f"{name} {outputs}x{inputs}", near, exact, torch.randn(rows, inputs))

    def _project(
        self, name: str, near: Sequence[Sequence[PackedWeight]], exact: Sequence[Tensor], x: Tensor
    ) -> None:
        """Each call has the next copy of the weight."""
        sides = [_by_turns(partial(self._kernels.linear, x), copies) for copies in near]
        *fast, slow = best_times([*sides, _by_turns(partial(ops.linear, x), exact)], self._rounds)
        work = 2e-9 * len(x) * near[0][0].outputs * near[0][0].inputs
        rates = "   ".join(
            f"{work / seconds:6.0f} GOP/s{1e-9 * copies[0].units.nbytes / seconds:7.1f} GB/s"
            for copies, seconds in zip(near, fast, strict=True)
        )
        ratios = "".join(f"{slow / seconds:7.1f}x" for seconds in fast)
        print(f"{name:24s}{len(x):5d}{rates}{work / slow:8.0f} GOP/s{ratios}")

    def attention(self) -> None:
        wide = torch.randn(self._files.config.pool_geometry(BLOCKS, BLOCK_SIZE).shape)
        pools = [self._quantized(wide), wide]
        print(
            f"\n{'attention of one layer':29s}{'int8 KV':>10s}{'float32 KV':>12s}{'torch':>10s}{'ratios':>9s}"
        )
        for count in SEQUENCES:
            self._attend(f"{count} decoding", pools, count, 1, CONTEXT)
        for count, context in LONG:
            self._attend(f"{count} decoding, {context} tokens", pools, count, 1, context)
        self._attend(f"prompt of {CONTEXT}", pools, 1, CONTEXT, CONTEXT)
        self._attend("the last 128 of 4096", pools, 1, 128, 4096)

    def _quantized(self, wide: Tensor) -> Tensor:
        """The same KV in 8 bits."""
        geometry = self._files.config.pool_geometry(BLOCKS, BLOCK_SIZE, "int8")
        pool = torch.zeros(geometry.shape, dtype=torch.int8)
        blocks = [block for block in range(BLOCKS) for _ in range(BLOCK_SIZE)]
        offsets = list(range(BLOCK_SIZE)) * BLOCKS
        for layer in range(geometry.layers):
            k, v = wide[:, layer].transpose(0, 1).transpose(2, 3).flatten(1, 2)
            self._kernels.kv_write(pool, layer, k, v, blocks, offsets)
        return pool

    def _attend(self, name: str, pools: Sequence[Tensor], sequences: int, queries: int, context: int) -> None:
        config = self._files.config
        rows = [ops.AttentionRow(queries, context - queries, table) for table in _tables(sequences, context)]
        q = torch.randn(sequences * queries, config.heads, config.head_dim)
        plan = ops.plan_attention(rows, pools[-1], config.sliding_window, TOKENS_PER_GROUP_CPU)
        # A step comes back to a layer only after all the others, when the caches hold nothing of it.
        layers = [cycle(range(config.layers)) for _ in range(3)]
        calls: list[Callable[[], object]] = [
            partial(self._attend_layer, q, pool, turns, rows)
            for pool, turns in zip(pools, layers, strict=False)
        ]
        calls.append(lambda: ops.paged_attention(q, pools[-1], next(layers[2]), plan))
        *near, exact = best_times(calls, self._rounds)
        ratios = "".join(f"{exact / seconds:6.1f}x" for seconds in near)
        print(f"{name:29s}{near[0] * 1e6:7.0f} us{near[1] * 1e6:9.0f} us{exact * 1e6:7.0f} us{ratios}")

    def _attend_layer(
        self, q: Tensor, pool: Tensor, layers: Iterator[int], rows: list[ops.AttentionRow]
    ) -> None:
        self._kernels.paged_attention(q, pool, next(layers), rows, self._files.config.sliding_window)

    def sampling(self) -> None:
        logits = torch.randn(SEQUENCES[-1], self._files.config.vocab_size) * 3
        choose = choose_with_kernels(self._kernels)
        print(f"\n{f'sampling {len(logits)} tokens':29s}{'kernels':>10s}{'torch':>10s}{'ratio':>8s}")
        for name, limits in {
            "greedy": {"temperature": 0.0},
            "temperature 1": {},
            "top_p 0.9": {"top_p": 0.9},
            "top_k 40": {"top_k": 40},
        }.items():
            params = SamplingParams(max_tokens=1, **{"temperature": 1.0, **limits})  # type: ignore[arg-type]
            samples = [Sample(params, [], [])] * len(logits)
            near, exact = best_times(
                [partial(choose, logits, samples), partial(choose_with_torch, logits, samples)], self._rounds
            )
            print(f"{name:29s}{near * 1e3:7.2f} ms{exact * 1e3:7.2f} ms{exact / near:7.1f}x")

    def steps(self) -> None:
        near, wide, exact = (self._runner(*kind) for kind in (("int8", "int8"), ("int8",), ("none",)))
        title = f"step, {CONTEXT} tokens of context"
        print(f"\n{title:29s}{'int8':>10s}{'float32 KV':>12s}{'float32':>10s}{'ratios':>10s}")
        for name, rows in _steps().items():
            calls = [partial(runner.run, rows) for runner in (near, wide, exact)]
            fast, middle, slow = best_times(calls, self._rounds)
            times = f"{fast * 1e3:7.1f} ms{middle * 1e3:9.1f} ms{slow * 1e3:7.1f} ms"
            print(f"{name:29s}{times}{slow / fast:6.2f}x{slow / middle:6.2f}x")

    @torch.inference_mode()
    def floats(self) -> None:
        sides: list[Computation] = []
        starts = ""
        for name, load in self._float_decoders().items():
            started_s = time.perf_counter()
            sides.append(load())
            starts += f"  {name} {time.perf_counter() - started_s:.1f} s"
        title = f"float32 step, {CONTEXT} tokens"
        print(f"\nstart:{starts}\n{title:29s}{'kernels':>10s}{'torch':>10s}{'--compile':>10s}{'ratios':>10s}")
        for name, rows in _steps().items():
            times = best_times([partial(side.compute, rows) for side in sides], self._rounds)
            ratios = "".join(f"{other / times[0]:6.2f}x" for other in times[1:])
            print(f"{name:29s}" + "".join(f"{each * 1e3:7.1f} ms" for each in times) + ratios)

    def _float_decoders(self) -> dict[str, Callable[[], Computation]]:
        """The kernels, torch, and torch with --compile, over one pool."""
        files = self._files
        pool = torch.zeros(files.config.pool_geometry(BLOCKS, BLOCK_SIZE).shape)

        def kernels() -> Computation:
            decoder = load_float_decoder(files, pool, self._threads, None)
            assert decoder is not None, "this processor has kernels"
            return decoder

        def by_torch(kind: type[Decoder]) -> Computation:
            return kind(files.config, load_weights(files, pool.dtype, pool.device, TORCH_PACKING), pool)

        return {
            "kernels": kernels,
            "torch": lambda: by_torch(Decoder),
            "--compile": lambda: by_torch(CompiledDecoder),
        }

    def logprobs(self) -> None:
        scored = Sample(SamplingParams(max_tokens=1, temperature=0, top_logprobs=5), [], [])
        targets = Targets(1, [7] * (CONTEXT - 1), 5)
        for name, runner in (("int8", self._runner("int8", "int8")), ("float32", self._runner("none"))):
            print(
                f"\n{f'5 logprobs each, {name}':29s}{'without':>10s}{'with':>10s}{'more':>8s}{'a token':>10s}"
            )
            for count in SEQUENCES:
                tables = _tables(count)
                sides = [
                    [Row([5], CONTEXT - 1, table, [sample]) for table in tables]
                    for sample in (GREEDY, scored)
                ]
                self._more(f"{count} decoding", runner, sides, count)
            sides = [[Row([7] * CONTEXT, 0, _tables(1)[0], [GREEDY], asked)] for asked in (None, targets)]
            self._more(f"prompt of {CONTEXT}", runner, sides, CONTEXT - 1)

    def _more(self, name: str, runner: TorchRunner, sides: Sequence[list[Row]], tokens: int) -> None:
        """What the second of two steps takes longer, for each of its tokens."""
        plain, scored = best_times([partial(runner.run, rows) for rows in sides], self._rounds)
        print(
            f"{name:29s}{plain * 1e3:7.1f} ms{scored * 1e3:7.1f} ms{scored / plain - 1:8.0%}"
            f"{(scored - plain) / tokens * 1e3:7.2f} ms"
        )

    def quality(self, pieces: int) -> None:
        runners = {
            "float32": self._runner("none"),
            "int8, KV float32": self._runner("int8"),
            "int8, KV int8": self._runner("int8", "int8"),
        }
        texts = _text(self._files, pieces)
        said = {name: [_all_logits(runner, piece) for piece in texts] for name, runner in runners.items()}
        print(f"\nover {pieces * (WINDOW - 1):,} tokens of the topics of Python's help():")
        for near, exact in combinations(reversed(said), 2):
            result = closeness(
                (q, p, torch.tensor(piece[1:]))
                for q, p, piece in zip(said[exact], said[near], texts, strict=True)
            )
            print(
                f"{near:16s} against {exact:16s}: perplexity {math.exp(result.near_loss):.3f} against "
                f"{math.exp(result.exact_loss):.3f} ({result.perplexity_change:+.2%}), mean KL divergence "
                f"{result.divergence:.5f} nats, the same greedy token {result.agreement:.1%}"
            )

    def _runner(self, quantization: str, kv: str = "float32") -> TorchRunner:
        return TorchRunner(
            self._files,
            self._files.config.pool_geometry(BLOCKS, BLOCK_SIZE, kv),
            None,
            threads=self._threads,
            quantization=quantization,
        )


def _steps() -> dict[str, list[Row]]:
    """Decode steps of some sizes, and a prompt."""
    steps = {
        f"{count} decoding": [Row([5], CONTEXT - 1, table, [GREEDY]) for table in _tables(count)]
        for count in SEQUENCES
    }
    return steps | {f"prompt of {CONTEXT}": [Row([7] * CONTEXT, 0, _tables(1)[0], [GREEDY])]}


def _by_turns(call: Callable[[T], object], weights: Sequence[T]) -> Callable[[], object]:
    turns = cycle(weights)
    return lambda: call(next(turns))


def _copies_beyond_caches(size: int) -> int:
    """So many that what one of them left in the caches is gone when it is its turn again."""
    return -(-CACHES_BYTES // size)


def _copies(weight: PackedWeight) -> list[PackedWeight]:
    count = _copies_beyond_caches(weight.units.nbytes)
    return [replace(weight, units=weight.units.clone()) for _ in range(count)]


def _four_bits(weight: Tensor) -> Groups:
    """As Q4_1 has it."""
    groups = weight.view(len(weight), -1, GROUP)
    minimums = groups.amin(-1).half()
    scales = ((groups.amax(-1) - minimums) / 15).half()
    steps = (groups - minimums.unsqueeze(-1)) / scales.unsqueeze(-1)
    return Groups(weight.shape[1], steps.round().clamp(0, 15).to(torch.uint8).flatten(1), scales, minimums)


def _projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs."""
    attended = config.heads * config.head_dim
    return {
        "qkv": ((config.heads + 2 * config.kv_heads) * config.head_dim, config.hidden_size),
        "output": (config.hidden_size, attended),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "unembedding": (config.vocab_size, config.hidden_size),
    }


def _tables(sequences: int, context: int = CONTEXT) -> list[list[int]]:
    """Block tables for `context` tokens each, over a shuffled pool."""
    count = -(-context // BLOCK_SIZE)
    shuffled = random.Random(1).sample(range(BLOCKS), sequences * count)
    return [shuffled[index * count : (index + 1) * count] for index in range(sequences)]


def _text(files: ModelFiles, pieces: int) -> list[list[int]]:
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = files.tokenizer().encode(text, add_special_tokens=False)
    step = len(ids) // pieces
    assert step >= WINDOW, "the text is long enough"
    return [ids[at * step : at * step + WINDOW] for at in range(pieces)]


def _all_logits(runner: TorchRunner, piece: list[int]) -> Tensor:
    """[tokens - 1, vocab]: each token is a row of its own over the same blocks, all in order."""
    table = list(range(-(-WINDOW // BLOCK_SIZE)))
    runner.run([Row(piece, 0, table, [])])
    rows = [Row([token], at, table, [GREEDY]) for at, token in enumerate(piece[:-1])]
    return torch.cat([runner.logits(rows[first : first + 64]) for first in range(0, len(rows), 64)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["linear", "attention", "sampling", "steps", "float32", "logprobs", "quality"]
    parser.add_argument("--part", choices=names)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--level", choices=LEVELS, default=processor_level())
    parser.add_argument("--pieces", type=int, default=8, help=f"of {WINDOW} tokens, for the quality")
    arguments = parser.parse_args()
    bench = Bench(arguments.threads, arguments.rounds, arguments.level)
    levels = f"kernels {arguments.level}, torch {torch.backends.cpu.get_cpu_capability()}"
    print(f"{levels}, {arguments.threads} thread(s)")
    parts: dict[str, Callable[[], None]] = {
        "linear": bench.linear,
        "attention": bench.attention,
        "sampling": bench.sampling,
        "steps": bench.steps,
        "float32": bench.floats,
        "logprobs": bench.logprobs,
        "quality": lambda: bench.quality(arguments.pieces),
    }
    for name, part in parts.items():
        if arguments.part in (None, name):
            part()


if __name__ == "__main__":
    main()
