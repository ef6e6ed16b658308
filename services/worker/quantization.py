"""What a worker computes with: what `--quantization auto` is on this machine, and why; and its type of KV.

It is decided before a worker has an identity, since that names it: blocks of KV are shared only between
workers that compute alike. The launcher decides for a whole cluster, so that its workers do not differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kernels.cpu.build import KernelsUnavailable, build, processor_level
from kernels.cpu.library import load_library
from services.core.errors import ConfigError
from services.model.home import diptych_home
from services.worker.config import WorkerConfig

BUILDING = "building the C++ kernels (once, about 10 s)"


@dataclass(frozen=True, slots=True)
class Quantization:
    name: Literal["none", "int8"]
    reason: str
    slower: bool = False  # than it would be if this machine had what the reason names

    def __str__(self) -> str:
        """For whoever starts a worker: one line."""
        if self.slower:
            return f"warning: no 8-bit weights, so steps take 2 to 6 times as long: {self.reason}"
        return f"quantization: {self.name} ({self.reason})"


def choose_quantization(config: WorkerConfig, on_build: Callable[[], object]) -> Quantization:
    """Builds the kernels if they are needed and not there, after a call of `on_build`.

    Raises ConfigError if int8 is demanded and there can be no kernels, or if it is to be compiled by torch.
    """
    if config.compile:
        return _for_torch(config)
    if config.quantization == "none":
        return Quantization("none", "as demanded")
    if config.quantization == "auto" and (config.device, config.dtype) != ("cpu", "float32"):
        return Quantization("none", f"int8 is for CPUs with float32, not {config.device} with {config.dtype}")
    try:
        return Quantization("int8", f"C++ kernels for {build_kernels(on_build)}")
    except KernelsUnavailable as error:
        if config.quantization == "int8":
            raise ConfigError(f"--quantization int8: {error}; or use --quantization none") from None
        return Quantization("none", str(error), slower=True)


def _for_torch(config: WorkerConfig) -> Quantization:
    if config.quantization == "int8":
        raise ConfigError(
            "--quantization int8 has nothing for --compile, which is for the torch model. "
            "Leave --compile out, or use --quantization none"
        )
    return Quantization("none", "--compile is for the torch model")


def choose_kv_dtype(config: WorkerConfig, quantization: str) -> str:
    """The type of the KV beside weights of `quantization`. Raises ConfigError if the two cannot be."""
    asked = config.kv_cache_dtype
    if quantization == "int8":
        if config.dtype != "float32":
            raise ConfigError(f"--quantization int8 computes with --dtype float32, not {config.dtype}")
        return "int8" if asked == "auto" else asked
    if asked not in ("auto", config.dtype):
        raise ConfigError(
            f"--kv-cache-dtype {asked} needs --quantization int8; without it KV has the type "
            f"of --dtype ({config.dtype}): leave --kv-cache-dtype at auto"
        )
    return config.dtype


def build_kernels(on_build: Callable[[], object]) -> str:
    """Build them if they are not there; the level of the processor that they are for.

    Raises KernelsUnavailable.
    """
    folder, level = diptych_home() / "kernels", processor_level()
    build(folder, level, on_build)
    load_library(folder, level)
    return level
