"""Whose turn it is among requests that wait: by priority class, and within a class fairly between tenants.

Classes share by weight, none starves. Each has a clock that advances by cost / weight when one of its
requests goes; the class whose clock is behind goes next (stride scheduling, Waldspurger 1995). One that was
empty sets its clock to the present, so it saves nothing up.

    clocks   high 310   normal 300 <- next   low 340

Tenants of a class take turns by deficit round robin over tokens (Shreedhar and Varghese 1995): at its turn a
tenant's deficit grows by a quantum, and it sends requests whose cost the deficit covers. So each tenant
sends about as many tokens as any other that has requests waiting, whatever their sizes and numbers.

Costs are in tokens. Pure: no clock, no waiting.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, Protocol, TypeVar


class Priority(IntEnum):
    HIGH = 0
    NORMAL = 1
    LOW = 2

    @property
    def label(self) -> str:
        return self.name.lower()


# Low gets enough not to starve: were it more, those who are few there would fare better than normal ones.
WEIGHTS = {Priority.HIGH: 64, Priority.NORMAL: 8, Priority.LOW: 1}
QUANTUM = 256  # tokens: about one short request, so that tenants alternate


class Queued(Protocol):
    @property
    def priority(self) -> Priority: ...
    @property
    def tenant(self) -> str: ...
    @property
    def cost(self) -> int:
        """Tokens, at least 1. It must not change while the item is queued."""
        ...


Item = TypeVar("Item", bound=Queued)


@dataclass(slots=True)
class _Tenant(Generic[Item]):
    items: deque[Item] = field(default_factory=deque)
    tokens: int = 0
    deficit: int = 0


class _Class(Generic[Item]):
    """Deficit round robin. The first tenant is the one whose turn it is."""

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.clock = 0.0
        self.tokens = 0
        self.tenants: OrderedDict[str, _Tenant[Item]] = OrderedDict()

    def __iter__(self) -> Iterator[Item]:
        return (item for tenant in self.tenants.values() for item in tenant.items)

    def push(self, item: Item) -> None:
        tenant = self.tenants.setdefault(item.tenant, _Tenant())
        tenant.items.append(item)
        tenant.tokens += item.cost
        self.tokens += item.cost

    def head(self) -> Item:
        """The next item, once for each call until somebody removes it."""
        if not any(self._affords(tenant) for tenant in self.tenants.values()):
            self._grow(self._rounds_missing() - 1)
        while not self._affords(tenant := next(iter(self.tenants.values()))):
            tenant.deficit += QUANTUM
            if not self._affords(tenant):
                self.tenants.move_to_end(next(iter(self.tenants)))
        return tenant.items[0]

    def take(self) -> Item:
        """Remove the head at its tenant's expense; a tenant that spent what it had goes to the end."""
        item = self.head()
        tenant = self.tenants[item.tenant]
        tenant.deficit -= item.cost
        self.remove(item)
        if tenant.items and not self._affords(tenant):
            self.tenants.move_to_end(item.tenant)
        return item

    def remove(self, item: Item) -> None:
        """A tenant with nothing left forgets its deficit: it may not save up."""
        tenant = self.tenants[item.tenant]
        tenant.items.remove(item)
        tenant.tokens -= item.cost
        self.tokens -= item.cost
        if not tenant.items:
            del self.tenants[item.tenant]

    @staticmethod
    def _affords(tenant: _Tenant[Item]) -> bool:
        return tenant.deficit >= tenant.items[0].cost

    def _rounds_missing(self) -> int:
        return min(-(-(t.items[0].cost - t.deficit) // QUANTUM) for t in self.tenants.values())

    def _grow(self, rounds: int) -> None:
        """All tenants have so many turns, in which none could send anything."""
        for tenant in self.tenants.values():
            tenant.deficit += rounds * QUANTUM


class FairQueue(Generic[Item]):
    def __init__(self) -> None:
        self._classes: dict[Priority, _Class[Item]] = {p: _Class(WEIGHTS[p]) for p in Priority}
        self._clock = 0.0  # of the class that went last

    def __len__(self) -> int:
        return sum(self.length(priority) for priority in Priority)

    def __iter__(self) -> Iterator[Item]:
        return (item for one in self._classes.values() for item in one)

    def length(self, priority: Priority) -> int:
        return sum(len(tenant.items) for tenant in self._classes[priority].tenants.values())

    def tokens(self, priority: Priority) -> int:
        return self._classes[priority].tokens

    def push(self, item: Item) -> None:
        one = self._classes[item.priority]
        if not one.tenants:
            one.clock = max(one.clock, self._clock)
        one.push(item)

    def head(self, passed_over: Collection[Priority] = ()) -> Item | None:
        """The next one, which stays; of classes that are not passed over."""
        waiting = [p for p, one in self._classes.items() if one.tenants and p not in passed_over]
        if not waiting:
            return None
        return self._classes[min(waiting, key=lambda p: (self._classes[p].clock, p))].head()

    def take(self, head: Item) -> None:
        """Remove what `head` gave, at the expense of its class and tenant."""
        one = self._classes[head.priority]
        self._clock = one.clock
        one.clock += head.cost / one.weight
        taken = one.take()
        assert taken is head, "only the head of a class can be taken"

    def remove(self, item: Item) -> None:
        """It does not want its turn any more."""
        self._classes[item.priority].remove(item)

    def tokens_ahead_in_class(self, priority: Priority, tenant: str, cost: int) -> int:
        """About how many tokens of its class go before a request that would come now: what its tenant has in
        the queue, and as much of each other tenant."""
        own = self._classes[priority]
        before = own.tenants[tenant].tokens if tenant in own.tenants else 0
        others = (t.tokens for name, t in own.tenants.items() if name != tenant)
        return before + sum(min(tokens, before + cost) for tokens in others)

    def tokens_ahead(self, priority: Priority, tenant: str, cost: int) -> float:
        """The same with those of the other classes, in proportion to the weights; as if nobody else came."""
        ahead = self.tokens_ahead_in_class(priority, tenant, cost)
        served = (ahead + cost) / self._classes[priority].weight
        rest = [one for p, one in self._classes.items() if p is not priority]
        return ahead + sum(min(one.tokens, served * one.weight) for one in rest)
