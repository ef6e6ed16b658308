"""The engine's own process: a loop around an Engine, beside the worker's I/O process.

Reason (measured): one busy Python thread beside a step of 420 small tensor operations makes it 18
times slower; a busy process next door costs nothing. The two processes share two file descriptors:
a socket for messages (`services.engine.pipe`) and, on a CPU, the memory of the KV pool. If the I/O
process is killed the kernel ends this one, even in the middle of a step.

    python -m services.engine.process SOCKET_FD POOL_FD      (started by EngineHandle only)
"""

import mmap
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from services.core.clock import SystemClock
from services.core.errors import DiptychError
from services.core.malloc import keep_freed_memory
from services.engine.engine import Engine
from services.engine.messages import Command, EngineReady, EngineSetup
from services.engine.pipe import EnginePipe

_PREPARING_POLL_S = 0.002  # until something that threads prepare is looked for again
_INTEGRITY_CHECK_S = 5.0  # at most this often: it reads the whole pool's books


def main() -> None:
    _ignore_terminal_signals()
    pipe = EnginePipe(socket.socket(fileno=int(sys.argv[1])))
    setup = msgspec.msgpack.decode(pipe.receive_one(), type=EngineSetup)
    pool = memoryview(mmap.mmap(int(sys.argv[2]), setup.geometry.shared_bytes))
    try:
        engine = _build(setup, pool)
        engine.warm_up()
        keep_freed_memory()  # from now on: the logits of 32 sequences are 6 MB, at every step
    except DiptychError as error:
        pipe.send(msgspec.msgpack.encode(EngineReady(error.message)))
        pipe.flush()
        return
    pipe.send(msgspec.msgpack.encode(EngineReady()))
    serve(engine, pipe)


def serve(engine: Engine, pipe: EnginePipe) -> None:
    """Run turns until the I/O process closes the pipe."""
    decoder = msgspec.msgpack.Decoder(Command)
    encoder = msgspec.msgpack.Encoder()

    def report() -> None:
        if engine.has_report:
            pipe.send(encoder.encode(engine.take_report()))

    engine.before_long_step = report
    progressed = False
    checked_s = time.monotonic()
    while True:
        if not progressed and time.monotonic() - checked_s > _INTEGRITY_CHECK_S:
            engine.check_integrity()
            checked_s = time.monotonic()
        # A step that found nothing to run finds nothing again until a command changes something.
        wait_s = _PREPARING_POLL_S if engine.preparing else None
        messages = pipe.receive(wait=not progressed, wait_s=wait_s)
        if messages is None:
            return
        for message in messages:
            engine.handle(decoder.decode(message))
        report()  # a reservation must not wait for the step that follows
        progressed = engine.step()
        report()


def _build(setup: EngineSetup, pool: memoryview) -> Engine:
    from services.engine.device.torch_runner import TorchRunner  # torch only in this process
    from services.model.files import open_model

    runner = TorchRunner(
        open_model(Path(setup.model)),
        setup.geometry,
        pool[: setup.geometry.bytes],
        threads=setup.threads,
        cores=setup.cores,
        device=setup.device,
        quantization=setup.compatibility.quantization,
        compiled=setup.compiled,
    )
    return Engine(
        runner,
        setup.compatibility,
        setup.geometry.blocks,
        setup.limits,
        SystemClock(),
        setup.geometry.generations(pool),
    )


def _ignore_terminal_signals() -> None:
    """Ctrl-C and SIGTERM reach the whole group; the I/O process decides when the engine ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    main()
