"""The decoder of kernels/cpu, with weights of 4 or 8 bits or in float32: loading it, and the engine's rows as
the kernels take them.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import KernelsUnavailable, processor_level
from kernels.cpu.core_slots import CoreSlots
from kernels.cpu.decoder import CpuDecoder, CpuModel
from kernels.cpu.kernels import CpuKernels
from kernels.cpu.packed_weight import PackedWeight, pack, pack_float_gate_up, pack_floats, pack_gate_up
from kernels.ops import AttentionRow
from services.core.errors import ConfigError
from services.engine.device.decoder import rope_frequencies
from services.engine.device.fused_tensor import FusedTensor
from services.engine.device.sampler import Choose, choose_with_kernels
from services.engine.device.weights import Packing, load_weights
from services.engine.messages import SharedCores
from services.engine.runner import Row
from services.model.files import ModelFiles
from services.model.home import diptych_home


class KernelDecoder:
    def __init__(self, decoder: CpuDecoder, choose: Choose) -> None:
        self._decoder = decoder
        self.choose = choose

    def compute(self, rows: Sequence[Row]) -> tuple[list[int], Tensor]:
        """Writes the rows' KV; the indices of the rows that are sampled and their float32 [.., vocab]."""
        sampled = [index for index, row in enumerate(rows) if row.samples]
        self._firsts = [0, *accumulate(len(row.tokens) for row in rows)]
        tokens = list(chain.from_iterable(row.tokens for row in rows))
        attended = [AttentionRow(len(row.tokens), row.start, row.block_table) for row in rows]
        scored = any(row.targets is not None for row in rows)
        return sampled, self._decoder.logits(tokens, attended, sampled, keep_all=scored)

    def logits_at(self, row: int, places: range) -> Tensor:
        """Of the last computed rows, some scored: float32 [places, vocab] after these of a row's tokens."""
        first = self._firsts[row]
        return self._decoder.logits_at(range(first + places.start, first + places.stop))


def load_int8_decoder(
    files: ModelFiles, pool: Tensor, threads: int, shared: SharedCores | None
) -> KernelDecoder:
    """Raises ModelFileError, or ConfigError if the kernels cannot be built or cannot use this pool."""
    if not _is_for_kernels(pool, torch.float32, torch.int8):
        raise ConfigError(
            "--quantization int8 computes on a CPU, with KV of float32 or int8: leave --device and --dtype "
            "as they are"
        )
    try:
        kernels = _kernels(threads, shared)
    except KernelsUnavailable as error:
        raise ConfigError(
            f"--quantization int8 needs its kernels: {error}; or use --quantization none"
        ) from None
    return _load(files, pool, kernels, GROUP_PACKING)


def load_float_decoder(
    files: ModelFiles, pool: Tensor, threads: int, shared: SharedCores | None
) -> KernelDecoder | None:
    """None where torch is to compute: on other devices and in other types than the kernels', where they
    cannot be built, and on processors for which they have nothing better. Raises ModelFileError.
    """
    if not _is_for_kernels(pool, torch.float32) or processor_level() == "plain":
        return None
    try:
        kernels = _kernels(threads, shared)
    except KernelsUnavailable:
        return None
    return _load(files, pool, kernels, FLOAT_PACKING)


def _is_for_kernels(pool: Tensor, *dtypes: torch.dtype) -> bool:
    return pool.device.type == "cpu" and pool.dtype in dtypes


def _kernels(threads: int, shared: SharedCores | None) -> CpuKernels:
    folder = diptych_home() / "kernels"
    if shared is None:
        return CpuKernels(folder, threads)
    try:
        slots = CoreSlots(Path(shared.file), shared.slot)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--core-slots: {error}; leave it out, `diptych up` makes it") from None
    return CpuKernels(folder, shared.cores, slots=slots)


def _load(
    files: ModelFiles, pool: Tensor, kernels: CpuKernels, packing: Packing[PackedWeight, PackedWeight]
) -> KernelDecoder:
    weights = load_weights(files, torch.float32, pool.device, packing)
    config = files.config
    model = CpuModel(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        window=config.sliding_window,
        rms_norm_eps=config.rms_norm_eps,
        frequencies=rope_frequencies(config),
        embedding=weights.embedding,
        layers=weights.layers,
        final_norm=weights.final_norm,
        unembedding=weights.unembedding,
    )
    return KernelDecoder(CpuDecoder(kernels, model, pool), choose_with_kernels(kernels))


def _packing(
    projection: Callable[[FusedTensor], PackedWeight], gate_up: Callable[[FusedTensor], PackedWeight]
) -> Packing[PackedWeight, PackedWeight]:
    """A table that is embedding and unembedding is in memory once."""

    def tied(matrix: FusedTensor) -> tuple[PackedWeight, PackedWeight]:
        packed = projection(matrix)
        return packed, packed

    return Packing(projection, gate_up, projection, tied)


GROUP_PACKING = _packing(lambda matrix: pack(matrix.groups()), lambda matrix: pack_gate_up(matrix.groups()))
FLOAT_PACKING = _packing(
    lambda matrix: pack_floats(matrix.floats()), lambda matrix: pack_float_gate_up(matrix.floats())
)
