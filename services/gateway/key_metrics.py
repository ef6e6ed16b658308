"""Counters by API key. Labels are the names of keys that were configured, never what a client sends."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

from services.keys.api_key import ApiKey

KEY_NAMES_MAX = 200  # labels; requests of further keys are counted together
OTHER_KEYS = "other keys"  # no key can be called so: it has a space


class KeyMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            name = f"diptych_gateway_key_{name}"
            return Counter(name, documentation, ["key", *labels], registry=registry)

        self._requests = counter("requests", "Requests of an API key, refused ones included")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were let in")
        self._completion_tokens = counter("completion_tokens", "Tokens of answers")
        self._rejections = counter(
            "rejections",
            "Requests refused with 429 by a limit of their key: requests, tokens, concurrent",
            "limit",
        )
        self._names: set[str] = set()

    def know(self, keys: Iterable[ApiKey]) -> None:
        """These are configured. A name that has been a label stays one."""
        for key in keys:
            if len(self._names) < KEY_NAMES_MAX:
                self._names.add(key.name)

    def count_request(self, name: str) -> None:
        self._requests.labels(self._label(name)).inc()

    def count_prompt(self, name: str, tokens: int) -> None:
        self._prompt_tokens.labels(self._label(name)).inc(tokens)

    def count_answer(self, name: str, tokens: int) -> None:
        self._completion_tokens.labels(self._label(name)).inc(tokens)

    def count_rejection(self, name: str, limit: str) -> None:
        self._rejections.labels(self._label(name), limit).inc()

    def _label(self, name: str) -> str:
        return name if name in self._names else OTHER_KEYS
