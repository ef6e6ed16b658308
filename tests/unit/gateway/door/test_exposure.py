"""Without keys a gateway is for its own machine, unless somebody says that it is not."""

import pytest

from services.core.errors import ConfigError
from services.core.loopback import is_loopback
from services.gateway.config import GatewayConfig
from services.gateway.door.exposure import check_exposure, described
from services.gateway.main import serve

ELSEWHERE = ["0.0.0.0", "::", "192.168.1.4", "2001:db8::1", "gateway.example", "", "127.1"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_this_machine_may_do_without_keys(host) -> None:
    assert is_loopback(host)
    check_exposure(GatewayConfig(host=host))


@pytest.mark.parametrize("host", ELSEWHERE)
def test_others_may_not_and_both_ways_out_are_named(host) -> None:
    with pytest.raises(ConfigError, match=r"diptych keys create.*--keys.*--open"):
        check_exposure(GatewayConfig(host=host))
    check_exposure(GatewayConfig(host=host, keys="redis"))
    check_exposure(GatewayConfig(host=host, open=True))


async def test_a_gateway_that_would_be_open_does_not_start() -> None:
    with pytest.raises(ConfigError, match="--open"):
        await serve(GatewayConfig(host="0.0.0.0", port=0, redis="redis://127.0.0.1:1"))


def test_the_log_says_who_may_use_it() -> None:
    assert described(GatewayConfig()) == "no API keys: this machine only"
    assert "open to whoever" in described(GatewayConfig(host="0.0.0.0", open=True))
    assert described(GatewayConfig(keys="file:/keys")) == "API keys from file:/keys"
