"""Which incarnation of a worker this is, and which new work it takes.

An incarnation ends with its process, or when the worker has stood still for as long as its membership
lease lives: the cluster has then taken it for dead and gone on without it. Whoever needs the worker's
key or epoch reads it from the one Incarnation, at the moment of use. Who checks what:

    Prefill.Run             check(epoch, "prefill")  else WorkerLost, Draining or RoleChanged
    Decode.Session submit   check(epoch, "decode")   else the same, as the sequence's only event
    KvTransfer.Pull         is_current(epoch)        else KvSourceLost; draining and the role do not matter
    KvTransfer.Release      is_current(epoch)        else "not valid"
    Control.SetRole         the worker's id
    the gateway             forgets sessions and cached prefixes of a key that membership no longer names

What may already run when the epoch changes is ended by the worker (`Worker.begin_anew`): sequences and
leases fail with WorkerLost. The KV cache is as it was, and is published again under the new key.

Only the worker's own clock decides, never Redis: a Redis that is away or restarts ends no incarnation.
The time is looked at in `beat`, several times a second, and in every check, because calls that came
while the process stood still may be handled before the next beat.
"""

import secrets
from collections.abc import Callable

from services.core.clock import Clock
from services.core.errors import Draining, RoleChanged, WorkerLost
from services.core.worker_report import Part, Role, WorkerKey, has_part

BEAT_S = 0.25


def random_epoch() -> int:
    return secrets.randbits(63)


class Incarnation:
    """`lease_s`: how long the cluster believes in a worker that says nothing."""

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        clock: Clock,
        lease_s: float,
        new_epoch: Callable[[], int] = random_epoch,
    ) -> None:
        self.key = key
        self.role = role
        self.draining = False
        self._clock = clock
        self._lease_s = lease_s
        self._new_epoch = new_epoch
        self._beat_at_s = clock.now()

    @property
    def silent_s(self) -> float:
        """Time since the last beat."""
        return self._clock.now() - self._beat_at_s

    def begin(self) -> None:
        """The worker is about to be announced: its lease counts from now."""
        self._beat_at_s = self._clock.now()

    def beat(self) -> bool:
        """This process runs. True: it had stood still for too long and is now a new incarnation."""
        lost = self._has_stood_still
        if lost:
            self.key = self.key._replace(epoch=self._new_epoch())
        self._beat_at_s = self._clock.now()
        return lost

    def is_current(self, epoch: int) -> bool:
        """Whether `epoch` is this incarnation, and it still lives."""
        return epoch == self.key.epoch and not self._has_stood_still

    def check(self, epoch: int, part: Part) -> None:
        """Raise unless a request that was routed to `epoch` may start its `part` here."""
        worker_id = self.key.worker_id
        if not self.is_current(epoch):
            raise WorkerLost(f"worker {worker_id} is another incarnation than the request was routed to")
        if self.draining:
            raise Draining(f"worker {worker_id} is draining")
        if not has_part(self.role, part):
            raise RoleChanged(f"worker {worker_id} does no {part} any more: its role is {self.role}")

    @property
    def _has_stood_still(self) -> bool:
        return self.silent_s > self._lease_s
