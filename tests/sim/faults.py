"""What goes wrong in a simulated cluster: kinds, targets and moments drawn from the seed, all counted."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import grpc.aio

from services.core.errors import WorkerLost
from services.gateway.path.attempts import EXCLUSION_S
from services.transfer.lease import Lease
from services.wire.generated import worker_pb2, worker_pb2_grpc
from tests.sim.gateway import SimGateway
from tests.sim.loop import Process
from tests.sim.worker import SimWorker, World


@dataclass(slots=True)
class Faults:
    """`mean_s` apart on average, while `run` runs. Some last; `heal` ends those at once."""

    world: World
    workers: list[SimWorker]
    gateways: list[SimGateway]
    rng: random.Random
    mean_s: float
    operator: Process
    gentle: bool  # one kind of fault alone, and never the last worker of its kind
    only: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    harms: list[float] = field(default_factory=list)  # when something could fail an attempt
    disturbances: int = 0  # faults so far
    _over: bool = False
    _outside: Context = field(default_factory=copy_context)  # of no process
    _ambush: list[Callable[[], None]] = field(default_factory=list)  # faults that wait for the next pull
    _reuses_due: int = 0  # leases whose blocks are to be reused while they are read
    _healing: list[Callable[[], None]] = field(default_factory=list)

    async def run(self) -> None:
        kinds = {
            "kill": (3, self._kill),
            "engine_kill": (1, self._kill_engine),
            "stall": (2, self._stall),
            "engine_stall": (2, self._stall_engine),
            "cut_gateway": (2, self._cut_gateway),
            "cut_workers": (3, self._cut_workers),
            "silence": (2, self._silence),
            "delay": (2, self._delay),
            "lease_expiry": (3, self._expire_leases),
            "reuse": (3, self._reuse_under_reader),
            "flip": (3, self._flip),
            "store_away": (1, self._store_away),
            "store_lost": (1, self._store_lost),
            "drain": (2, self._drain),
            "store_cut": (1, self._cut_store),
            "gateway_kill": (1, self._kill_gateway),
            "gateway_stall": (1, self._stall_gateway),
            "role": (2, self._change_role),
        }
        if self.gentle:
            self.only = self.rng.choice(list(kinds))
            kinds = {self.only: kinds[self.only]}
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        self.world.network.on_pull = self._pulling
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / self.mean_s))
            name = self.rng.choices(names, weights)[0]
            fault = partial(self._inflict, name, kinds[name][1])
            if name == "lease_expiry" or self.rng.random() < 0.4:
                self._ambush.append(fault)
            else:
                fault()

    def _inflict(self, name: str, fault: Callable[[], bool]) -> None:
        if not self._over and fault():
            self.counts[name] += 1
            self.disturbances += 1
            self.harms.append(self.world.clock.now())

    def _pulling(self) -> None:
        """Those in ambush strike while KV moves."""
        if self._ambush and self.rng.random() < 0.3:
            after_s = self.rng.choice([0.0, self.rng.uniform(0.0, 0.002), self.rng.uniform(0.0, 0.05)])
            self._outside_call(after_s, self._ambush.pop())
        if self._reuses_due and not self._over:
            self._reuse_if_read()

    def heal(self) -> None:
        """End whatever lasts; nothing new goes wrong any more."""
        self._over = True
        while self._healing:
            self._healing[0]()

    @property
    def lasting(self) -> bool:
        """Whether some fault has not ended yet."""
        return bool(self._healing)

    def _until_later(self, heal: Callable[[], None], lasts_s: float) -> None:
        """Call `heal` after `lasts_s`, or when `heal()` comes before."""

        def once() -> None:
            if once in self._healing:
                self._healing.remove(once)
                heal()

        self._healing.append(once)
        self.world.loop.call_later(lasts_s, once)

    def _lasting(self) -> float:
        """Mostly shorter than a membership lease, sometimes far longer: then a request can meet it again,
        each time that it has no other worker than the one it avoided for a while."""
        lasts_s = self.rng.choice([self.rng.uniform(0.05, 1.0), self.rng.uniform(1.0, 4.0), 8.0])
        again = int(lasts_s / EXCLUSION_S)
        self.harms += [self.world.clock.now() + EXCLUSION_S * n for n in range(1, again + 1)]
        return lasts_s

    def _alive_worker(self) -> SimWorker | None:
        """A worker that can be taken away: mostly one that leaves another of its kind."""
        alive = [worker for worker in self.workers if worker.alive and not worker.io.stopped]
        if not alive:
            return None
        victim = self.rng.choice(alive)
        others = [w for w in alive if w is not victim and w.config.role in (victim.config.role, "both")]
        last_too = not self.gentle and self.rng.random() < 0.15
        return victim if others or last_too else None

    def _kill(self) -> bool:
        victim = self._alive_worker()
        if victim is not None:
            victim.kill()
        return victim is not None

    def _kill_engine(self) -> bool:
        victim = self._alive_worker()
        if victim is None or not victim.engine_is_up:
            return False
        victim.kill_engine()
        return True

    def _kill_gateway(self) -> bool:
        victim = self.rng.choice(self.gateways)
        if not victim.alive or len(self.gateways) == 1:
            return False
        victim.kill()
        self.world.loop.call_later(self.rng.uniform(0.2, 2.0), victim.start)
        return True

    def _stall(self) -> bool:
        victim = self._alive_worker()
        if victim is None:
            return False
        lasts_s = self._lasting()
        self.world.trace.note(victim.name, f"stops for {lasts_s:.2f} s")
        io, engine = victim.freeze()
        self._until_later(lambda: victim.thaw(io, engine), lasts_s)
        return True

    def _stall_engine(self) -> bool:
        victim = self._alive_worker()
        if victim is None or victim.engine_process.stopped:
            return False
        lasts_s = self._lasting()
        self.world.trace.note(victim.name, f"its engine stops for {lasts_s:.2f} s")
        victim.engine_process.stop()
        self._until_later(victim.engine_process.resume, lasts_s)
        return True

    def _cut_gateway(self) -> bool:
        pair = (self.rng.choice(self.gateways).name, self.rng.choice(self.workers).name)
        return self._break_link(*pair, "cut", self.world.network.cut)

    def _cut_workers(self) -> bool:
        return self._break_link(*self._two_workers(), "cut", self.world.network.cut)

    def _silence(self) -> bool:
        hosts = [self.rng.choice(self.gateways).name, *self._two_workers()]
        return self._break_link(*self.rng.sample(hosts, 2), "silent", self.world.network.silence)

    def _break_link(self, one: str, other: str, how: str, fault: Callable[[str, str], None]) -> bool:
        if one == other:
            return False
        lasts_s = self._lasting()
        self.world.trace.note(f"{one}-{other}", f"the link is {how} for {lasts_s:.2f} s")
        fault(one, other)
        self._until_later(lambda: self.world.network.mend(one, other), lasts_s)
        return True

    def _delay(self) -> bool:
        one, other = self.rng.sample([self.rng.choice(self.gateways).name, *self._two_workers()], 2)
        delay_s, lasts_s = self.rng.choice([0.01, 0.1, 0.5]), self._lasting()
        self.world.trace.note(f"{one}-{other}", f"the link is {delay_s} s slower for {lasts_s:.2f} s")
        self.world.network.link(one, other).extra_s = delay_s
        self._until_later(lambda: self.world.network.mend(one, other), lasts_s)
        return True

    def _expire_leases(self) -> bool:
        """End leases as if their time had come, though somebody works under them."""
        leases = [(worker, lease) for worker in self.workers for lease in _leases(worker)]
        for worker, lease in leases:
            self._expire(worker, lease)
            lease.failed(WorkerLost("the lease expired"))
        return bool(leases)

    def _reuse_under_reader(self) -> bool:
        """Free and reuse the blocks of a lease whose reader is half way, and is not told."""
        self._reuses_due += 1
        return False  # counted when blocks are reused

    def _reuse_if_read(self) -> None:
        for worker in self.workers:
            for lease in _leases(worker):
                if lease.firsts and lease.holders > 0:
                    self._reuses_due -= 1
                    self._expire(worker, lease)
                    self._outside_call(self.rng.uniform(0.0003, 0.002), partial(self._reuse_blocks, worker))
                    return

    def _outside_call(self, after_s: float, call: Callable[[], object]) -> None:
        """Not as part of the process that happens to run now."""
        self.world.loop.call_later(after_s, call, context=self._outside)

    def _expire(self, worker: SimWorker, lease: Lease) -> None:
        self.world.trace.note(worker.name, f"the lease of {lease.transfer_id} expires")
        worker.leases._end(lease, "expired")

    def _reuse_blocks(self, worker: SimWorker) -> None:
        if worker.alive and worker.engine.reuse_blocks():
            self.counts["reuse"] += 1
            self.harms.append(self.world.clock.now())

    def _flip(self) -> bool:
        one, other = self._two_workers()
        self.world.network.link(one, other).flips += 1
        return False  # counted when a byte has really flipped

    def _store_away(self) -> bool:
        return self._lose_store(empty=False)

    def _store_lost(self) -> bool:
        return self._lose_store(empty=True)

    def _lose_store(self, *, empty: bool) -> bool:
        store = self.world.store
        if store.away:
            return False
        lasts_s = self._lasting()
        self.world.trace.note("store", f"is away for {lasts_s:.2f} s" + (" and loses all" if empty else ""))
        store.go_away(hangs=self.rng.random() < 0.5)
        self._until_later(lambda: store.come_back(empty=empty), lasts_s)
        return True

    def _cut_store(self) -> bool:
        """One process alone loses the store: the others take a worker for dead that is not."""
        name = self.rng.choice([*self.workers, *self.gateways]).name
        cut_off = self.world.store.cut_off
        if name in cut_off:
            return False
        lasts_s = self._lasting()
        self.world.trace.note(name, f"cannot reach the store for {lasts_s:.2f} s")
        cut_off.add(name)
        self._until_later(lambda: cut_off.discard(name), lasts_s)
        return True

    def _stall_gateway(self) -> bool:
        victim = self.rng.choice(self.gateways)
        if not victim.alive or victim.process.stopped:
            return False
        lasts_s = self._lasting()
        self.world.trace.note(victim.name, f"stops for {lasts_s:.2f} s")
        process = victim.process
        process.stop()
        self.world.network.stopped(process)
        self._until_later(process.resume, lasts_s)
        return True

    def _drain(self) -> bool:
        victim = self._alive_worker()
        if victim is None or victim.stop.is_set():
            return False
        self.world.trace.note(victim.name, "is asked to drain")
        victim.terminate(restart=True)
        return True

    def _change_role(self) -> bool:
        """Through the worker's Control service; somebody who decodes is left."""
        victim = self._alive_worker()
        if victim is None or not victim.address:
            return False
        role = self.rng.choice(["prefill", "decode", "both"])
        others = [w for w in self.workers if w.alive and w is not victim and w.role != "prefill"]
        if role == "prefill" and not others:
            return False
        self.world.trace.note(victim.name, f"is asked to change its role from {victim.role} to {role}")
        self.operator.start(self._set_role(victim.name, victim.address, role))
        return True

    async def _set_role(self, worker_id: str, address: str, role: str) -> None:
        channel = self.world.network.of(self.operator).open_channel(address)
        request = worker_pb2.SetRoleRequest(worker_id=worker_id, role=role)
        with suppress(grpc.aio.AioRpcError):
            await worker_pb2_grpc.ControlStub(channel).SetRole(request, timeout=1.0)
        await channel.close()

    def _two_workers(self) -> tuple[str, str]:
        names = [worker.name for worker in self.workers]
        return self.rng.choice(list(combinations(names, 2)))


def _leases(worker: SimWorker) -> list[Lease]:
    return list(worker.leases._leases.values()) if worker.alive and worker.leases else []
