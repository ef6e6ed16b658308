"""What the benchmark's processes tell each other: the load, what the sources served, what the clients saw.

All times are seconds of the machine's monotonic clock, which its processes share.
"""

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    concurrency: int  # requests at any moment, each on a connection of its own
    answer_tokens: int  # on average: from half as many to half as many again
    streamed: bool = True
    steps_per_s: float = 0.0  # of each decode worker; 0: as fast as the gateway reads
    prefill_ms: float = 0.0
    timings: bool = False  # ask for where the time went


class Window(msgspec.Struct, frozen=True):
    """When a run begins, and what of it is measured."""

    begins_at: float
    measured_from: float
    ends_at: float

    @property
    def seconds(self) -> float:
        return self.ends_at - self.measured_from

    def covers(self, at: float) -> bool:
        return self.measured_from <= at < self.ends_at


class SourceOrder(msgspec.Struct, frozen=True, kw_only=True):
    load: Load
    redis: str
    served_model: str
    prefills: int
    decodes: int
    token_ids: list[int]  # of every answer, over and over


class ClientOrder(msgspec.Struct, frozen=True, kw_only=True):
    load: Load
    window: Window
    port: int
    model: str
    answer_characters: list[int]  # that are complete after so many tokens, from one on


class Served(msgspec.Struct, kw_only=True):
    """A request at its workers."""

    run_at: float = 0.0  # the prefill worker has it
    replied_at: float = 0.0
    emitted_at: list[float] = []  # all tokens but the first one


class Call(msgspec.Struct, kw_only=True):
    """A request at its client."""

    sent_at: float
    request_id: str = ""  # the gateway's
    # At each piece of the stream that held events: when it came, and how many tokens were there then.
    seen_at: list[float] = []
    tokens: list[int] = []
    events: int = 0
    ended_at: float | None = None
    problem: str = ""
    timings: dict[str, float | int | str | None] | None = None


class ClientReport(msgspec.Struct, frozen=True):
    calls: list[Call]
    cpu_share: float  # of one core, of the client itself
