"""The guest that says what time each of its clocks has (`guests/clocks`)."""

import re
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.support.daemon import DEADLINE_S, Attached

FIELD = re.compile(r"([a-z]+)=(\d+)")


class Clocks(NamedTuple):
    """One answer."""

    tsc: int
    kvmclock: int  # ns
    pm: int  # of 24 bits, 3 579 545 a second
    beats: int  # 100 a second
    rtc: int  # seconds
    up: int  # what tsc was when it came up
    lost: int = 0  # model-specific registers that no longer hold what the guest wrote when it came up

    @classmethod
    def ask(cls, console: Attached) -> "Clocks":
        """Have it answer once."""
        console.type("\r")
        console.expect("tsc=", DEADLINE_S)
        at = console.seen - len("tsc=")
        console.expect("\r\n", DEADLINE_S)
        said = console.said[at : console.seen].decode()
        return cls(**{name: int(number) for name, number in FIELD.findall(said)})

    @classmethod
    def ask_until(cls, console: Attached, enough: "Callable[[Clocks], bool]") -> "Clocks":
        """Have it answer until that is enough."""
        deadline = time.monotonic() + DEADLINE_S
        while not enough(now := cls.ask(console)):
            assert time.monotonic() < deadline, f"not enough after {DEADLINE_S} s: {now}"
        return now
