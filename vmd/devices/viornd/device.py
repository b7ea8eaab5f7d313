"""viornd: a virtio entropy device (virtio 1.2, 5.4; *cat. 6.3*), bounded in what one request and one wake-up cost."""

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.virtio.queue import Queue

REQUEST_MAX = 64 * 1024  # bytes given for one request; a driver that wants more asks again
BUDGET = 16  # requests of one wake-up
BYTES_PER_S = 4 << 20  # a guest that does nothing but ask must not keep a processor busy
BURST_BYTES = 1 << 20


class Viornd:
    """Fills whatever the driver offers with random bytes of the host's kernel."""

    features = 0  # the rings' own are added for every device
    config = b""

    def __init__(self, interrupt: "Callable[[int], None]") -> None:
        self.interrupt = interrupt
        self.queue: Queue | None = None
        self.allowance = float(BURST_BYTES)
        self.filled_s = time.monotonic()
