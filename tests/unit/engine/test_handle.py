"""When an engine counts as overdue, with one that never says anything."""

import asyncio

from services.core.clock import ManualClock
from services.engine.handle import EngineHandle
from services.engine.messages import Command

TICK_S, OVERDUE_S, HUNG_S = 0.25, 2.0, 20.0


class SilentEngine(EngineHandle):
    def __init__(self, clock: ManualClock) -> None:
        super().__init__(1, lambda report: None, clock)
        self.killed = False

    def send(self, command: Command) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


async def test_time_in_which_this_process_stood_still_is_not_the_engine_s_silence() -> None:
    clock = ManualClock()
    engine = SilentEngine(clock)
    told: list[bool] = []
    watching = asyncio.create_task(engine.watch(OVERDUE_S, HUNG_S, told.append))

    async def pass_time(seconds: float) -> None:
        for _ in range(5):  # the watch reaches its sleep, and wakes from it
            await asyncio.sleep(0)
        clock.advance(seconds)

    for _ in range(3):
        await pass_time(10 * HUNG_S)
    await pass_time(0)
    assert (told, engine.killed) == ([], False)
    for _ in range(int(OVERDUE_S / TICK_S)):
        await pass_time(TICK_S)
    await pass_time(0)
    assert (told, engine.killed) == ([True], False)
    for _ in range(int(HUNG_S / TICK_S)):
        await pass_time(TICK_S)
    await watching
    assert engine.killed
