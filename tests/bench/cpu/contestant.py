"""What is common to contestants: a server that can be prepared, and started with one of its settings."""

import json
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from services.model.home import diptych_home
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Cell

Family = Literal["Diptych", "llama.cpp", "vLLM", "transformers"]
# Of the weights. The last two are not what Diptych computes with: they are shown, but no aim is about them.
Precision = Literal["4 bits", "8 bits", "float32", "4 bits rounded again", "bfloat16"]
COMPARED: tuple[Precision, ...] = ("4 bits", "8 bits", "float32")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a server. Several are tried, and the best one is measured in full."""

    name: str
    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)  # what its requests say beside the common fields


class Opened(Protocol):
    """A contestant that is ready to be asked."""

    @property
    def command(self) -> str:
        """As typed, with what matters of its environment."""
        ...

    def warm_up(self, cell: Cell) -> None: ...

    def measure(self, cell: Cell, repetition: str) -> Figures:
        """One repetition. What the contestant does wrong is in the figures; PeerFailed: there are none."""
        ...


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def family(self) -> Family: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def settings(self) -> Sequence[Setting]: ...

    @property
    def starts_slowly(self) -> bool:
        """So that all its rounds are measured in one turn."""
        ...

    def prepare(self) -> None:
        """Install, build, convert: whatever is not there yet. Raises PeerFailed."""
        ...

    def group(self, cell: Cell) -> Hashable:
        """Cells of one group are measured with one start of the server."""
        ...

    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> AbstractContextManager[Opened]:
        """Raises PeerFailed if it does not start."""
        ...


def bench_home() -> Path:
    """Where peers' installations, builds and converted models stay."""
    return diptych_home() / "bench"


def shown(command: Sequence[str], setting: Setting) -> str:
    """As a person would type it, who is at home."""
    environment = [f"{name}={value}" for name, value in setting.environment.items()]
    body = ["; requests with", json.dumps(dict(setting.body))] if setting.body else []
    return " ".join([*environment, *command, *body]).replace(str(Path.home()), "~")
