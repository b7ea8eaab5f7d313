"""The daemon is killed and restarted repeatedly while guests work, and no guest notices."""

import contextlib
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.support import churn
from tests.support.daemon import Terminal
from tests.support.debian import built_deb, debian_host
from tests.support.guests import guest
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network
from tests.systemd.box import Box
from tests.systemd.test_unit import Unit, restart, same

Say = Callable[[str, object], None]

pytestmark = [pytest.mark.root, pytest.mark.kvm]

DISKS, NICS = 10, 10  # VMs of each kind
FRAMES = 100  # of each kind, in one command to a guest
DISK_BYTES = 8 << 20
ROUND_S = 1.0  # between two ends, even if the daemon does not serve yet
SERVES_EVERY = 10  # rounds between two waits until a daemon serves
BUSY_S = 300.0  # a watchdog for the work of guests on a busy host


class BoxNetwork(Network):
    """The network of a box."""

    def __init__(self, box: Box) -> None:
        self.fd = os.open(f"/proc/{box.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Worker:
    """One guest at work, with its own thread here.  The guest or its peer checks every byte."""

    def __init__(self, box: Box, tty: str) -> None:
        self.console = Terminal(str(box.path(tty)))
        self.rounds = 0
        self.failure: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self.work()
                self.rounds += 1
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        """Let the guest do a piece of work.  Raises AssertionError if any data was lost or wrong."""
        raise NotImplementedError

    def end(self) -> None:
        """End the thread, and raise the exception that it had, if any."""
        self._end.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure


class DiskWorker(Worker):
    """Writes patterns to its disk, reads them back and compares."""

    def work(self) -> None:
        """Wait until the guest has done another round."""
        churn.ask_until_rounds(self.console, 1, BUSY_S)


class NetWorker(Worker):
    """Sends frames of all sizes to its peer, and receives the peer's."""

    def work(self) -> None:
        """Let the guest and its peer exchange more frames."""
        said = self.console.answer(f"frames count={FRAMES}", "ready", BUSY_S)
        assert "frames are through" in said, said
        assert "FAIL" not in said, said


def conf() -> str:
    """Return the configuration of 20 VMs.  Each works on a disk or an interface, and also has a local interface."""
    blocks = ["staggered start parallel 5 delay 1", 'switch "lan" { interface br0 }']
    for number in range(DISKS):
        lines = ("memory 32M", 'boot "/srv/blk.elf" cmdline "churn"', f'disk "/srv/disk{number}" format raw')
        blocks.append("\n".join((f'vm "disk{number}" {{', *lines, "local interface", "}")))
    for number in range(NICS):
        first = f"interface {{ lladdr fe:e1:ba:00:01:{number:02x} }}"
        lines = ("memory 64M", 'boot "/srv/net.elf"', first)
        blocks.append("\n".join((f'vm "net{number}" {{', *lines, 'interface switch "lan"', "local interface", "}")))
    return "\n".join(blocks) + "\n"


def files(unit: Unit) -> Counter[str]:
    """Return the number of processes of each title, and of the descriptors of the long-lived ones."""
    found: Counter[str] = Counter()
    for line in unit.box.must("ps", "-eo", "pid=,stat=,args=").splitlines():
        pid, stat, title = line.split(None, 2)
        if not title.startswith("vmd: ") and int(pid) != unit.main:
            continue
        kind = "vmd" if int(pid) == unit.main else title
        found[f"{kind} ended" if stat.startswith("Z") else kind] += 1
        if re.fullmatch(r"vmd: (vmm|priv|control)|vmd", kind):
            with contextlib.suppress(FileNotFoundError):
                found[f"files of {kind}"] += len(os.listdir(unit.box.path(f"/proc/{pid}/fd")))
    return found


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """Give a Debian with the package installed."""
    with Box(root=debian_host(), target="multi-user.target") as running:
        for name in ("blk", "net"):
            running.copy(guest(name), f"/srv/{name}.elf")
        for number in range(DISKS):
            running.path(f"/srv/disk{number}").write_bytes(bytes(DISK_BYTES))
        running.must("dpkg", "--install", running.copy(built_deb(), "/root/vmd.deb"))
        running.must("systemctl", "stop", "vmd")
        yield running


@pytest.fixture
def unit(box: Box) -> Iterator[Unit]:
    """Give the unit with all VMs at work or about to."""
    unit = Unit(box)
    unit.configure(conf())
    unit.start()
    for kind, count in (("disk", DISKS), ("net", NICS)):
        for number in range(count):
            unit.wait_running(f"{kind}{number}")
    yield unit
    box.must("vmctl", "stop", "-afw")
    box.must("systemctl", "stop", "vmd")


@contextlib.contextmanager
def working(unit: Unit) -> Iterator[list[Worker]]:
    """Let all guests work.  At the end, check that none has failed."""
    network = BoxNetwork(unit.box)
    with network, contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        for number in range(DISKS):
            disk = DiskWorker(unit.box, unit.status(f"disk{number}")["tty"])
            churn.begin(disk.console, BUSY_S)
            workers.append(disk)
        peers = []
        for number in range(NICS):
            row = unit.status(f"net{number}", verbose=True)
            peers.append(stack.enter_context(Peer(Interface(network, row["interfaces"][0]["tap"]))))
            net = NetWorker(unit.box, row["tty"])
            net.console.expect("ready", BUSY_S)
            workers.append(net)
        for worker in workers:
            worker.start()
        try:
            yield workers
        finally:
            failures = []
            for worker in workers:
                try:
                    worker.end()
                except BaseException as error:
                    failures.append(error)
        assert failures == []
        assert [complaint for peer in peers for complaint in peer.complaints] == []


def cut(unit: Unit) -> None:
    """Kill the daemon at any point of its start.  There may be none at the moment."""
    unit.box.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "vmd")


def begin_restart(unit: Unit) -> None:
    """Ask for a restart, without waiting for earlier ones."""
    unit.box.must("systemctl", "restart", "--no-block", "vmd")


def wait_until_it_serves(unit: Unit) -> None:
    """Wait for a daemon that serves, and has no job in systemd."""

    def serves() -> bool:
        found = unit.box.properties("vmd.service")
        return found["ActiveState"] == "active" and not found.get("Job")

    unit.box.wait_for(serves, "no daemon serves")


def soak(unit: Unit, seed: int, duration_s: float) -> str:
    """Kill and restart the daemon for `duration_s`.  Return a summary."""
    choose = random.Random(seed)
    names = [f"disk{number}" for number in range(DISKS)] + [f"net{number}" for number in range(NICS)]
    ends: Counter[str] = Counter()
    with working(unit) as workers:
        restart(unit)  # compare with rows of an adopted state
        before = {name: same(unit.status(name)) for name in names}
        network, had = unit.network(), files(unit)
        first_rounds = [worker.rounds for worker in workers]
        until_s = time.monotonic() + duration_s
        while (began_s := time.monotonic()) < until_s:
            end = choose.choice((cut, begin_restart))
            end(unit)
            ends[end.__name__] += 1
            if ends.total() % SERVES_EVERY == 0:
                wait_until_it_serves(unit)
                ends["served"] += 1
            time.sleep(max(0.0, began_s + ROUND_S - time.monotonic()))  # the test needs this rhythm
        wait_until_it_serves(unit)
        for worker, first in zip(workers, first_rounds, strict=True):
            unit.box.wait_for(
                lambda worker=worker, first=first: worker.rounds > first or worker.failure is not None,  # type: ignore[misc]
                "a guest does no more work",
            )
        assert {name: same(unit.status(name)) for name in names} == before
        assert unit.network() == network
        unit.box.wait_for(lambda: not files(unit) - had, f"more than {had} is left: {files(unit) - had}")
    rounds = sum(worker.rounds for worker in workers)
    return (
        f"{len(names)} guests, none lost, {rounds} pieces of work, every byte right; "
        f"{ends['cut']} kills and {ends['begin_restart']} restarts, {ends['served']} times waited for"
    )


@pytest.mark.deep
@pytest.mark.timeout(900, func_only=True)
def test_two_minutes(unit: Unit, request: pytest.FixtureRequest, record_property: Say) -> None:
    """The daemon is killed or restarted every second, mostly before it serves.  The test prints counts."""
    record_property("done", soak(unit, request.config.getoption("--seed"), 120))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_number_of_seconds(unit: Unit, request: pytest.FixtureRequest, record_property: Say) -> None:
    """The option --sequences is the number of seconds."""
    option = request.config.getoption
    record_property("done", soak(unit, option("--seed"), option("--sequences")))
