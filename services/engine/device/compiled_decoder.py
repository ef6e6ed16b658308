"""The torch decoder with each layer's halves around attention compiled by torch (`--compile`).

What a token gives for itself (norms, rotation, gate, sums, on a GPU the matrix products too) is compiled
once, for any number of tokens and all layers alike, before the worker is ready. Products with packed
weights, which the compiler cannot look into, and attention, whose groups differ from step to step, stay as
they are. Nothing is compiled later: what there would be no code for runs as it does without `--compile`.

torch keeps what it compiles in DIPTYCH_HOME/compiled, so only the first start is slow.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from services.core.errors import ConfigError
from services.engine.device.decoder import Decoder
from services.engine.device.weights import LayerWeights, Weights
from services.engine.runner import Row
from services.model.config import ModelConfig
from services.model.home import diptych_home


class CompiledDecoder(Decoder):
    def __init__(self, config: ModelConfig, weights: Weights[Tensor, Tensor], pool: Tensor) -> None:
        """See Decoder. Compiles, which takes up to a minute at first. Raises ConfigError if it cannot."""
        super().__init__(config, weights, pool)
        self._packed = weights.layers[0].qkv.is_mkldnn
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(diptych_home() / "compiled"))
        inductor.compile_threads = 1  # in this process: others would stay beside it, waiting for more
        self._opaque_linear = _opaque(super()._linear)
        self._compiled_projected = torch.compile(super()._projected, dynamic=True)
        self._compiled_finished = torch.compile(super()._finished, dynamic=True)
        self._compile()

    @torch.inference_mode()
    def _compile(self) -> None:
        """Writes KV to block 0, which nobody owns yet."""
        torch.compiler.set_stance("default")
        try:
            self.compute([Row([0], 0, [0], [])])
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"--compile: torch cannot compile here ({reason}). "
                "Install g++ (for a GPU also triton), or leave --compile out"
            ) from error
        torch.compiler.set_stance("eager_on_recompile")

    def compute(self, rows: Sequence[Row]) -> tuple[list[int], Tensor]:
        # torch would compile a single token by itself, and sum it in another order perhaps: it has company.
        if len(rows) == 1 and len(rows[0].tokens) == 1:
            rows = [rows[0], replace(rows[0], samples=(), targets=None)]
        return super().compute(rows)

    def _projected(
        self, layer: LayerWeights[Tensor], hidden: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        projected: tuple[Tensor, Tensor, Tensor] = self._compiled_projected(layer, hidden, angles)
        return projected

    def _finished(self, layer: LayerWeights[Tensor], hidden: Tensor, attended: Tensor) -> Tensor:
        finished: Tensor = self._compiled_finished(layer, hidden, attended)
        return finished

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        linear = self._opaque_linear if self._packed else super()._linear
        return linear(x, weight, bias)


def _opaque(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Left as it is by the compiler."""
    wrapped: Callable[..., Tensor] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return wrapped
