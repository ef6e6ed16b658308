"""The C++ kernels that this machine has built, for processes with a DIPTYCH_HOME of their own."""

from pathlib import Path

from services.model.home import diptych_home


def share_kernels(home: Path) -> None:
    """`home` uses this machine's folder of them instead of building them again."""
    folder = diptych_home() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(folder, target_is_directory=True)
