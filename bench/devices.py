"""Device processes: the time from spawn to ready, and the memory that each adds to the host.

The processes run here without a VM.  In a VM they start in parallel, and before the VM needs them.
"""

from collections.abc import Callable
from pathlib import Path

from bench.table import Row
from tests.support.fakedriver import Device
from tests.support.netdriver import net_start
from tests.support.network import Network, TapInterface

ROUNDS = 15
IMAGE_BYTES = 64 << 20


def measure(directory: Path, _guest: Callable[[str], Path]) -> list[Row]:
    """Start each kind of device process several times."""
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    rows = []
    for kind, queues in (("vioblk", 1), ("vioscsi", 3)):
        times, sizes = [], []
        for _ in range(ROUNDS):
            with image.open("rb+") as disk, Device(kind, [disk.fileno()], queues=queues) as device:
                device.start()
                times.append(device.ready_ms)
                sizes.append(device.pss_kib() / 1024)
        rows += [Row(f"{kind}, spawned to ready", "ms", times), Row(f"{kind}, memory (pss)", "MiB", sizes)]
    times, sizes = [], []
    with Network() as network:
        for _ in range(ROUNDS):
            with TapInterface(network) as tap, Device("vionet", [tap.fd], queues=2, net=net_start()) as device:
                device.start()
                times.append(device.ready_ms)
                sizes.append(device.pss_kib() / 1024)
    return [*rows, Row("vionet, spawned to ready", "ms", times), Row("vionet, memory (pss)", "MiB", sizes)]
