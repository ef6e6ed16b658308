"""What torch can compute on, in words: for `diptych doctor`."""

import torch

from services.core.errors import ConfigError
from services.core.usable_cores import usable_cores


def describe_device(name: str) -> str:
    """Compute something there, then describe it. Raises ConfigError if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"torch {torch.__version__} cannot compute on {name!r}: {reason}") from None
    return f"{_kind(device)}, torch {torch.__version__}"


def _kind(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{usable_cores()} CPU cores"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name} with {facts.total_memory / 2**30:.0f} GiB"
