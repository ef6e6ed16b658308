"""Where Diptych keeps what it may always make again: models, caches, logs of a local cluster."""

import os
from pathlib import Path


def diptych_home() -> Path:
    """$DIPTYCH_HOME, or ~/.cache/diptych. Looked up at each call; the folder may not exist yet."""
    chosen = os.environ.get("DIPTYCH_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "diptych"
