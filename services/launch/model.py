"""`diptych model pull` and `diptych model path`: the default model's file."""

import argparse
import os
from pathlib import Path

from services.core.errors import ModelFileError
from services.launch.display import Display
from services.model.pull import default_model_path, ensure_default_model


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("model", help="bring or find the default model", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    pull = actions.add_parser("pull", help="download the default model, if it is not here yet")
    pull.set_defaults(run=run_pull)
    path = actions.add_parser("path", help="print where the default model is or would be")
    path.set_defaults(run=run_path)


def run_pull(_: argparse.Namespace) -> int:
    print(pull_default_model(Display()))
    return 0


def run_path(_: argparse.Namespace) -> int:
    print(default_model_path())
    return 0


def resolve_model(chosen: str, display: Display) -> Path:
    """The model a person chose, or the default one, downloaded if needed. Raises ModelFileError."""
    if not chosen:
        return pull_default_model(display)
    path = Path(os.path.expanduser(chosen)).absolute()  # which leaves ~ of nobody as it is
    if not path.exists():
        raise ModelFileError(f"{path} does not exist; --model takes a GGUF file or a Hugging Face folder")
    return path


def pull_default_model(display: Display) -> Path:
    with display.download("downloading SmolLM2-135M-Instruct") as progress:
        return ensure_default_model(progress)
