"""Who can reach a gateway, and whether that is meant: without API keys only this machine can, unless told."""

from services.core.errors import ConfigError
from services.core.loopback import is_loopback
from services.gateway.config import GatewayConfig


def check_exposure(config: GatewayConfig) -> None:
    """Raises ConfigError if anybody on the network could use the cluster without asking anybody."""
    if config.keys or config.open or is_loopback(config.host):
        return
    raise ConfigError(
        f"without API keys the gateway listens to this machine only, not on {config.host}. Make keys with "
        "`diptych keys create NAME` and pass --keys file:PATH (or redis); or, if something in front of the "
        "gateway checks who asks, pass --open"
    )


def described(config: GatewayConfig) -> str:
    """For the log: who may use it."""
    if config.keys:
        return f"API keys from {config.keys}"
    if config.open:
        return "no API keys: open to whoever reaches it (--open)"
    return "no API keys: this machine only"
