"""The kernels' decoder: near float32 with 8-bit weights, and the same to the last bit however it is used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.cpu.build import KernelsUnavailable
from kernels.cpu.core_slots import SLOT_BYTES
from kernels.cpu.kernels import CpuKernels
from services.core.errors import ConfigError
from services.engine.device.decoder import Decoder
from services.engine.device.fused_tensor import FusedTensor
from services.engine.device.torch_runner import TorchRunner
from services.engine.device.weights import Packing, load_weights
from services.engine.messages import SharedCores
from services.engine.runner import Row, Sample, Targets
from services.model.files import open_model
from services.model.home import diptych_home
from services.model.pool_geometry import PoolGeometry
from services.transfer.destination import Destination
from services.transfer.pool_memory import PoolMemory
from tests.kernels.test_int8_linear import quantized
from tests.unit.engine.device.tiny_gguf import quantized_model
from tests.unit.engine.device.tiny_models import CONFIGS, GREEDY, SIZES, Driver, open_runner, random_model

BLOCKS, BLOCK_SIZE = 64, 8


@pytest.fixture(scope="module", autouse=True)
def kernels() -> CpuKernels:
    try:
        return CpuKernels(diptych_home() / "kernels", threads=1)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def open_kernels(path: Path, threads: int, block_size: int, kv: str, quantization: str) -> TorchRunner:
    files = open_model(path)
    geometry = files.config.pool_geometry(BLOCKS * BLOCK_SIZE // block_size, block_size, kv)
    return TorchRunner(files, geometry, None, threads=threads, quantization=quantization)


def open_int8(path: Path, threads: int = 1, block_size: int = BLOCK_SIZE, kv: str = "int8") -> TorchRunner:
    return open_kernels(path, threads, block_size, kv, "int8")


def relative_error(near: torch.Tensor, exact: torch.Tensor) -> float:
    return float((near - exact).square().mean().sqrt() / exact.std())


class Rounded(torch.Tensor):
    """A weight whose products torch computes as the kernels do: both sides rounded, then in float32."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(quantized(x).float(), weight.as_subclass(torch.Tensor), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def rounded_reference(path: Path, block_size: int) -> Decoder:
    """The torch decoder with weights and activations rounded as the kernels have them."""

    def table(matrix: FusedTensor) -> torch.Tensor:
        return matrix.groups().dequantized().contiguous()

    def rounded(matrix: FusedTensor) -> torch.Tensor:
        return table(matrix).as_subclass(Rounded)

    def tied(matrix: FusedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return table(matrix), rounded(matrix)

    files = open_model(path)
    pool = torch.zeros(files.config.pool_geometry(BLOCKS, block_size).shape)
    weights = load_weights(files, torch.float32, torch.device("cpu"), Packing(rounded, rounded, table, tied))
    return Decoder(files.config, weights, pool)


# Sums rounded in another order now and then push an activation to the next step; KV of torch has no steps.
@pytest.mark.parametrize(("kv", "error"), [("float32", 0.04), ("int8", 0.2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_that_torch_computes_with_the_same_rounding(
    name: str, kv: str, error: float, tmp_path: Path
) -> None:
    random_model(name).save_pretrained(tmp_path)
    reference = rounded_reference(tmp_path, BLOCK_SIZE)
    driver = Driver(open_int8(tmp_path, kv=kv))
    tokens, start = torch.randint(0, 199, (100,)).tolist(), 0
    for size in (33, 1, 7, 59):
        row = driver.row(tokens[start : start + size], start)
        logits = driver.runner.logits([row])
        with torch.inference_mode():
            assert relative_error(logits, reference.compute([row])[1]) < error
        start += size


def test_a_quantised_file_computes_with_its_own_numbers(tmp_path: Path) -> None:
    """Rows of q and k are permuted, gate and up fused, mixtures become 8 bits."""
    path = quantized_model(tmp_path)
    reference, driver = rounded_reference(path, BLOCK_SIZE), Driver(open_int8(path, kv="float32"))
    row = driver.row(torch.randint(0, 199, (40,)).tolist(), 0)
    with torch.inference_mode():
        logits, expected = driver.runner.logits([row]), reference.compute([row])[1]
        exact = open_runner(path).logits([row])
    assert relative_error(logits, expected) < 0.04
    assert relative_error(expected, exact) < 0.2


def test_the_default_model_is_near_float32_and_agrees_on_the_next_token(default_model: Path) -> None:
    tokens = (
        open_model(default_model).tokenizer().encode("The capital of France is", add_special_tokens=False)
    )
    exact = Driver(open_runner(default_model, block_size=16)).logits(tokens, [len(tokens)])
    near = Driver(open_int8(default_model, block_size=16)).logits(tokens, [len(tokens)])
    assert relative_error(near, exact) < 0.1
    assert int(near.argmax()) == int(exact.argmax())


class Sequences:
    """What each of some sequences gives, token by token, when it is computed alone."""

    def __init__(self, path: Path, kv: str, quantization: str) -> None:
        self.path, self.kv, self.quantization = path, kv, quantization
        self.tokens = [torch.randint(0, 199, (length,)).tolist() for length in (70, 9, 33, 1)]
        self.alone = []
        for tokens in self.tokens:
            self.alone.append(Driver(self.open(1, BLOCK_SIZE)).logits(tokens, [1] * len(tokens)))

    def open(self, threads: int, block_size: int) -> TorchRunner:
        return open_kernels(self.path, threads, block_size, self.kv, self.quantization)


KINDS = [  # model, type of KV, quantisation of the weights
    ("llama", "float32", "int8"),
    ("llama", "int8", "int8"),
    ("gguf", "int8", "int8"),
    ("mistral", "int8", "int8"),
    ("qwen2", "int8", "int8"),
    ("qwen3", "int8", "int8"),
    ("mistral", "float32", "none"),
    ("qwen3", "float32", "none"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def sequences(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    name, kv, quantization = request.param
    path = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    if name == "gguf":
        return Sequences(quantized_model(path), kv, quantization)
    random_model(name).save_pretrained(path)
    return Sequences(path, kv, quantization)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sequence_has_the_same_bits_in_every_batch_chunk_thread_and_block_size(
    sequences: Sequences, data: Any
) -> None:
    """Random steps: each computes a random piece of some of the sequences, in a random order. Some of the
    rows are sampled; in some steps prompt tokens are scored too."""
    block_size = data.draw(st.sampled_from([4, 8, 16]))
    runner = sequences.open(data.draw(st.sampled_from([1, 2, 5])), block_size)
    blocks = 80 // block_size
    drivers = [Driver(runner, range(at * blocks, (at + 1) * blocks)) for at in range(len(sequences.tokens))]
    done = [0] * len(drivers)
    while any(at < len(tokens) for at, tokens in zip(done, sequences.tokens, strict=True)):
        open_ones = [i for i, tokens in enumerate(sequences.tokens) if done[i] < len(tokens)]
        chosen = data.draw(st.lists(st.sampled_from(open_ones), min_size=1, unique=True))
        sizes = [data.draw(st.integers(1, min(40, len(sequences.tokens[i]) - done[i]))) for i in chosen]
        sampled = [data.draw(st.booleans()) for _ in chosen]
        targets = data.draw(st.sampled_from([None, Targets(1, [], 0)]))
        rows = [
            drivers[i].row(sequences.tokens[i][done[i] : done[i] + size], done[i], GREEDY if asked else None)
            for i, size, asked in zip(chosen, sizes, sampled, strict=True)
        ]
        logits = iter(runner.logits([replace(row, targets=targets) for row in rows]))
        for i, size, asked in zip(chosen, sizes, sampled, strict=True):
            done[i] += size
            if asked:
                assert torch.equal(next(logits), sequences.alone[i][done[i] - 1])


@pytest.mark.parametrize("kv", ["float32", "int8"])
@pytest.mark.parametrize("block_size", [BLOCK_SIZE, 4])
def test_blocks_of_another_worker_decode_to_the_same_bits(tmp_path: Path, block_size: int, kv: str) -> None:
    """What a transfer does: the prefill worker's blocks, in other places of the decode worker's pool."""
    random_model("llama").save_pretrained(tmp_path)
    prefill, alone = open_int8(tmp_path, kv=kv), open_int8(tmp_path, kv=kv)
    decode = open_int8(tmp_path, threads=2, block_size=block_size, kv=kv)
    prompt, samples = torch.randint(0, 199, (21,)).tolist(), [Sample(GREEDY, [], [])]
    prefill.run([Row(prompt, 0, [1, 2, 3], [])])
    table = [7, 0, 5, 9, 2, 8][: 24 // block_size]
    move(prefill, [1, 2, 3], decode, table, len(prompt))
    (moved,) = decode.logits([Row([9], 21, table, samples)])
    assert torch.equal(moved, alone.logits([Row([*prompt, 9], 0, [1, 2, 3], samples)])[0])


def move(source: TorchRunner, blocks: list[int], target: TorchRunner, table: list[int], tokens: int) -> None:
    """Through the bytes of both pools, as a transfer without a network."""
    ours, theirs = pool_memory(target), pool_memory(source)
    payload = theirs.read(blocks)
    Destination(ours, table, tokens, held_tokens=0).place(0, tokens, payload, theirs.block_size, after=0)
    target.pool.copy_(torch.frombuffer(ours.pool, dtype=target.pool.dtype).view(target.pool.shape))


def pool_memory(runner: TorchRunner) -> PoolMemory:
    """A copy."""
    blocks, layers, _, kv_heads, block_size, _ = runner.pool.shape
    dtype = str(runner.pool.dtype).removeprefix("torch.")
    geometry = PoolGeometry(blocks, layers, kv_heads, block_size, SIZES["hidden_size"] // 6, dtype)
    memory = bytearray(runner.pool.numpy().tobytes())
    return PoolMemory(geometry, memoryview(memory + bytes(geometry.shared_bytes - len(memory))))


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_sequence_that_overflows_leaves_the_others_as_they_are(kv: str, tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 1e38
    model.save_pretrained(tmp_path)
    runner, calm = open_int8(tmp_path, kv=kv), [5, 6, 8, 9]
    samples = [Sample(GREEDY, [], [])]
    (expected,) = runner.logits([Row(calm, 0, [3], samples)])
    both = runner.logits([Row([7, 7, 7], 0, [1], samples), Row(calm, 0, [2], samples)])
    assert torch.equal(both[1], expected)
    assert kv == "int8" or runner.pool.isfinite().all()  # scales: tests/kernels/test_int8_attention.py
    assert torch.equal(runner.logits([Row(calm, 0, [1], samples)])[0], expected)


def test_a_worker_that_shares_its_cores_computes_the_same_bits_whoever_is_busy(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "cores"
    file.write_bytes(bytes(2 * SLOT_BYTES))
    files = open_model(tmp_path)
    geometry = files.config.pool_geometry(BLOCKS, BLOCK_SIZE, "int8")
    first, second = (
        TorchRunner(
            files, geometry, None, threads=1, quantization="int8-g32", cores=SharedCores(str(file), slot, 3)
        )
        for slot in range(2)
    )
    rows = [Row(torch.randint(0, 199, (40,)).tolist(), 0, [1, 2, 3, 4, 5], [Sample(GREEDY, [], [])])]
    alone = open_int8(tmp_path).logits(rows)
    assert file.read_bytes() == bytes(2 * SLOT_BYTES)
    for runner in (first, second, second, first):
        assert torch.equal(runner.logits(rows), alone)
    assert all(any(file.read_bytes()[slot * SLOT_BYTES :][:SLOT_BYTES]) for slot in range(2))


@pytest.mark.parametrize("slots", [None, 1])
def test_a_place_among_the_cores_that_is_not_there_names_the_option(
    tmp_path: Path, slots: int | None
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    if slots:
        (tmp_path / "cores").write_bytes(bytes(slots * SLOT_BYTES))
    files = open_model(tmp_path)
    geometry = files.config.pool_geometry(4, 8)
    with pytest.raises(ConfigError, match=r"--core-slots: .*cores"):
        TorchRunner(
            files,
            geometry,
            None,
            threads=1,
            quantization="int8-g32",
            cores=SharedCores(str(tmp_path / "cores"), 1, 2),
        )


def test_what_the_kernels_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("llama").save_pretrained(tmp_path)
    files = open_model(tmp_path)
    geometry = files.config.pool_geometry(4, 8, "bfloat16")
    with pytest.raises(ConfigError, match="--dtype"):
        TorchRunner(files, geometry, None, threads=1, quantization="int8")
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        open_int8(tmp_path)
