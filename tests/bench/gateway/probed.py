"""A gateway that tells how long a request waits for some of its parts; takes the arguments of `diptych`.

A part's time is from its call to its end, waiting for other processes and for the event loop's other work
included. At its end it prints the means over all requests.
"""

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable

from services.gateway.admission.admission import Admission
from services.gateway.admission.place_queue import PlaceQueue
from services.gateway.text.chat import ChatReader
from services.gateway.text.prompt import PromptReader
from services.gateway.text.tokenizing import Tokenizing
from services.launch.cli import main

PROBED: dict[str, tuple[type, str]] = {
    "from checked body to tokens": (PromptReader, "read"),
    "  of it: chat template, in its process": (ChatReader, "text"),
    "  of it: tokeniser": (Tokenizing, "encode"),
    "admission": (Admission, "admit"),
    "  of it: where it is cached (Redis)": (PlaceQueue, "locate"),
}
spent_s: defaultdict[str, list[float]] = defaultdict(list)


def probe(name: str, owner: type, method: str) -> None:
    original: Callable = getattr(owner, method)

    @functools.wraps(original)
    async def timed(*arguments, **named):
        begun = time.perf_counter()
        try:
            return await original(*arguments, **named)
        finally:
            spent_s[name].append(time.perf_counter() - begun)

    setattr(owner, method, timed)


if __name__ == "__main__":
    for part, (owner, method) in PROBED.items():
        probe(part, owner, method)
    code = main(sys.argv[1:])
    for part, times in spent_s.items():
        times.sort()
        mean, median = sum(times) / len(times), times[len(times) // 2]
        print(f"probe: {part:38} mean {mean * 1e3:6.2f} ms, median {median * 1e3:6.2f} ms", file=sys.stderr)
    sys.exit(code)
