"""TorchRunner: the ModelRunner that computes a real model: on a CPU with the kernels of kernels/cpu where
they can be built, elsewhere with torch.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from services.core.errors import ConfigError
from services.core.logprobs import PromptLogprobs
from services.core.sampling import SamplingParams
from services.engine.device.decoder import Decoder
from services.engine.device.grammar import Grammars, Guidance
from services.engine.device.kernel_decoder import load_float_decoder, load_int8_decoder
from services.engine.device.logprobs import prompt_logprobs, sampled_logprobs, score
from services.engine.device.sampler import Choose, sample_tokens
from services.engine.device.weights import TORCH_PACKING, load_weights
from services.engine.messages import SharedCores
from services.engine.runner import Outcome, Row, Targets
from services.model.config import ModelConfig
from services.model.files import ModelFiles
from services.model.grammar import GrammarVocabulary
from services.model.pool_geometry import DTYPE_BYTES, PoolGeometry

# Prompt tokens whose logits are in memory at once: 25 MB of them for the default model, and enough rows
# for the unembedding to run at full speed.
_SCORED_AT_ONCE = 128
_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}


class Computation(Protocol):
    @property
    def choose(self) -> Choose: ...

    def compute(self, rows: Sequence[Row]) -> tuple[list[int], Tensor]:
        """Writes the rows' KV; the indices of the rows that are sampled and their float32 [.., vocab]."""
        ...

    def logits_at(self, row: int, places: range) -> Tensor:
        """Of the last computed rows, one with targets: float32 [places, vocab] after these of its tokens."""
        ...


class TorchRunner:
    """Weights, activations and KV all have the geometry's dtype, unless the weights are quantised; then
    the KV alone has it.

    On a CPU with float32, a row's numbers do not depend on the other rows of its batch; with the kernels
    neither on how its prompt was cut into chunks, nor on the threads and the block size.
    """

    def __init__(
        self,
        files: ModelFiles,
        geometry: PoolGeometry,
        pool: memoryview | None,
        *,
        threads: int,
        device: str = "cpu",
        quantization: str = "none",
        compiled: bool = False,
        cores: SharedCores | None = None,
    ) -> None:
        """Loads the model, which takes seconds.

        `pool` is memory shared with the I/O process, of geometry.bytes zeros (CPU only); None: the
        runner allocates the pool on its device. `threads` are this process's CPU threads for computing;
        `cores` are those that the kernels share with other workers, instead.

        Raises ModelFileError, or ConfigError if the geometry is not the model's, or the quantisation or
        compiling is not possible here.
        """
        _check_geometry(files.config, geometry)
        _set_threads(threads)
        self.pool = _pool_tensor(geometry, pool, device)
        self._decoder = _decoder(files, self.pool, threads, cores, quantization, compiled)
        self._grammars = Grammars(
            lambda: GrammarVocabulary.of(files.tokenizer(), files.config.vocab_size).load(), threads
        )

    def prepare(self, params: SamplingParams) -> bool:
        """See ModelRunner. Raises ModelFileError if this model's answers cannot follow any grammar."""
        return not params.grammar or self._grammars.prepare(params.grammar)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        """Writes the rows' KV; see ModelRunner."""
        if not rows:
            return []
        outcomes = self._sample(rows)
        for index, row in enumerate(rows):
            if row.targets is not None:
                outcomes[index] = replace(outcomes[index], scored=self._scored(index, row, row.targets))
        if self.pool.is_cuda:
            torch.cuda.synchronize(self.pool.device)  # readers of the pool wait for no stream of ours
        return outcomes

    def _sample(self, rows: Sequence[Row]) -> list[Outcome]:
        sampled, logits = self._decoder.compute(rows)
        samples = [sample for index in sampled for sample in rows[index].samples]
        places = [place for place, index in enumerate(sampled) for _ in rows[index].samples]
        if len(samples) > len(logits):  # several choices are drawn from the logits of one row
            logits = logits[places]
        guidance = Guidance(self._grammars, samples)
        chosen = sample_tokens(logits, samples, self._decoder.choose, guidance.restrict)
        guidance.follow(chosen)
        outcomes = [Outcome([], []) for _ in rows]
        logprobs = sampled_logprobs(logits, chosen, samples)
        for number, place in enumerate(places):
            outcome = outcomes[sampled[place]]
            if number in guidance.complete:
                outcome.complete.add(len(outcome.tokens))
            if number in guidance.failures:
                outcome.failures[len(outcome.tokens)] = guidance.failures[number]
            outcome.tokens.append(chosen[number])
            outcome.logprobs.append(logprobs[number])
        return outcomes

    def _scored(self, index: int, row: Row, targets: Targets) -> PromptLogprobs:
        """In parts: the logits of a whole chunk would fill the memory."""
        first, count = targets.first - 1 - row.start, len(targets.ids)
        parts = [range(at, min(at + _SCORED_AT_ONCE, count)) for at in range(0, count, _SCORED_AT_ONCE)]
        return prompt_logprobs(
            targets,
            [
                score(
                    self._decoder.logits_at(index, range(first + part.start, first + part.stop)),
                    targets.ids[part.start : part.stop],
                    targets.top,
                )
                for part in parts
            ],
        )

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks: (from, to) each."""
        sources, targets = torch.tensor(copies, device=self.pool.device).unbind(dim=1)
        self.pool.index_copy_(0, targets, self.pool[sources])

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Writes the rows' KV; float32 [sampled rows, vocab], in the order of the rows."""
        sampled, logits = self._decoder.compute(rows)
        order = sorted(range(len(sampled)), key=sampled.__getitem__)
        return logits[order]


def _decoder(
    files: ModelFiles,
    pool: Tensor,
    threads: int,
    cores: SharedCores | None,
    quantization: str,
    compiled: bool,
) -> Computation:
    if quantization != "none":
        return load_int8_decoder(files, pool, threads, cores)
    if compiled:
        return _torch_decoder(files, pool, compiled)
    return load_float_decoder(files, pool, threads, cores) or _torch_decoder(files, pool, compiled)


def _torch_decoder(files: ModelFiles, pool: Tensor, compiled: bool) -> Computation:
    if pool.dtype == torch.int8:
        raise ConfigError("--kv-cache-dtype int8 needs --quantization int8: torch computes with floats")
    weights = load_weights(files, pool.dtype, pool.device, TORCH_PACKING)
    if compiled:
        from services.engine.device.compiled_decoder import CompiledDecoder  # importing it takes seconds

        return CompiledDecoder(files.config, weights, pool)
    return Decoder(files.config, weights, pool)


def _check_geometry(config: ModelConfig, geometry: PoolGeometry) -> None:
    expected = config.pool_geometry(geometry.blocks, geometry.block_size, geometry.dtype)
    if geometry != expected:
        raise ConfigError(
            f"The KV pool has {geometry.layout}, but the model needs {expected.layout}. "
            "Start the worker with the same model that its pool was made for."
        )


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    # torch allows this once per process, before its first parallel work. We use no inter-op
    # parallelism, so a process that is past that point loses nothing.
    with suppress(RuntimeError):
        torch.set_num_interop_threads(1)


def _pool_tensor(geometry: PoolGeometry, pool: memoryview | None, device: str) -> Tensor:
    dtype = _DTYPES[geometry.dtype]
    if pool is None:
        return torch.zeros(geometry.shape, dtype=dtype, device=device)
    if device != "cpu" or pool.nbytes != geometry.bytes:
        raise ConfigError(
            f"A shared KV pool must be on the CPU and have {geometry.bytes:,} bytes; this one is for "
            f"device {device!r} and has {pool.nbytes:,} bytes."
        )
    return torch.frombuffer(pool, dtype=dtype).view(geometry.shape)
