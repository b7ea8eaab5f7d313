"""Debian's stock kernel is sent and received while it works, with its processors, memory, disk and connections."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.hostnet import NetDaemon, load_modules, ours
from tests.support.linux import LinuxGuest
from tests.support.migration import Plan
from tests.support.network import Network
from tests.support.shell import Shell
from tests.support.transfers import from_file, move, to_file

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.timeout(400)]

BOOT_S = 150
WAIT_S = 120
LIVE_S = 600  # watchdog; the memory of a running guest is sent several times
ROUNDS = "3"
MIB = 1 << 20
CONSTANT, WRITTEN = 12, 4  # MiB of the disk: constant data, and the part behind it that the guest writes
HOST, GUEST = "10.0.0.1", "10.0.0.2"


class Stream:
    """An endless file by HTTP, until `end` is called."""

    def __init__(self) -> None:
        self.digest = hashlib.md5(usedforsecurity=False)
        self.sent = 0
        self.more = threading.Condition()
        self.last = threading.Event()
        self.ended = threading.Event()

    def pieces(self) -> Iterator[bytes]:
        """Yield its pieces, for one client."""
        number = 0
        while not self.last.is_set():
            at = number * servers.STEP % MIB
            piece = servers.PIECE[at : at + MIB // 4]
            self.digest.update(piece)
            yield piece
            with self.more:
                self.sent += len(piece)
                self.more.notify()
            number += 1
        self.ended.set()

    def goes_on(self, sent: int) -> None:
        """Wait until more than `sent` bytes are sent."""
        with self.more:
            assert self.more.wait_for(lambda: self.sent > sent, WAIT_S)

    def end(self) -> str:
        """End the file.  Return the MD5 of all that was sent."""
        self.last.set()
        assert self.ended.wait(WAIT_S)
        return self.digest.hexdigest()


class Traveller:
    """A guest with two processors that reads and writes its disk, reads its memory, and downloads a file."""

    def __init__(self, vmd: NetDaemon, disk: Path, stream: Stream, shell: Shell) -> None:
        self.vmd = vmd
        self.disk = disk
        self.stream = stream
        self.shell = shell
        self.name = "a"
        self.consoles = contextlib.ExitStack()
        whole = disk.read_bytes()
        self.sums = {servers.md5([whole[: CONSTANT * MIB]]), servers.md5([whole[: WRITTEN * MIB]])}

    def begin(self) -> None:
        """Start the guest's work."""
        run = self.shell.run
        run(f"ip link set eth0 up && ip address add {GUEST}/24 dev eth0")
        run(f"dd if=/dev/vda of=/tmp/memory bs=1M count={WRITTEN} 2>/dev/null && md5sum </tmp/memory")
        run(
            "(while [ ! -e /tmp/stop ]; do"
            f" dd if=/dev/vda bs=1M count={CONSTANT} 2>/dev/null | md5sum;"
            f" dd if=/tmp/memory of=/dev/vda bs=64k seek={CONSTANT * 16} conv=fsync 2>/dev/null;"
            " echo 3 >/proc/sys/vm/drop_caches;"
            f" dd if=/dev/vda bs=1M skip={CONSTANT} count={WRITTEN} 2>/dev/null | md5sum;"
            " md5sum </tmp/memory;"
            " done; echo ended) >/tmp/sums 2>&1 &"
        )
        run(f"(wget -q -O - http://{HOST}/stream | md5sum) >/tmp/got 2>&1 &")
        self.works()

    def works(self) -> None:
        """Wait for progress of all its work."""
        sums, sent = self.counted(), self.stream.sent
        self.shell.wait_for(f"[ $(wc -l </tmp/sums) -gt {sums + 3} ]")
        self.stream.goes_on(sent)

    def counted(self) -> int:
        """Return the number of checksums that the guest has made."""
        return int(self.shell.run("wc -l </tmp/sums"))

    def moved(self, name: str) -> None:
        """Attach to the console of the VM that the guest is in now."""
        self.name = name
        self.consoles.close()
        self.shell.console = self.consoles.enter_context(self.vmd.attached(name))

    def finish(self) -> None:
        """End the guest's work, and check all results, including the disk."""
        wanted = self.stream.end()
        self.shell.run("touch /tmp/stop")
        self.shell.wait_for("grep -q ended /tmp/sums")
        sums = self.shell.run("cat /tmp/sums").split()
        assert sums[-1] == "ended"
        assert set(sums[:-1]) - {"-"} == self.sums
        self.shell.wait_for("[ -s /tmp/got ]")
        assert self.shell.run("cat /tmp/got").split()[0] == wanted
        assert self.shell.run("grep -c ^processor /proc/cpuinfo").strip() == "2"
        print(f"{len(sums) // 2} sums, {self.stream.sent // MIB} MiB downloaded")
        self.shell.run("sync")
        self.vmd.must("stop", "-fw", self.name)
        self.consoles.close()
        raw = self.disk.read_bytes()
        assert raw[CONSTANT * MIB :] == raw[: WRITTEN * MIB]


def conf(vms: str = "") -> str:
    """Return the configuration of a daemon."""
    return f'switch "lan" {{\n    interface lan\n}}\n{vms}'


def add_lan(network: Network, *addresses: str) -> None:
    """Create the administrator's bridge, so that the other end of the guest's connection outlives the daemon."""
    network.run("ip", "link", "add", "lan", "type", "bridge")
    for address in addresses:
        network.run("ip", "address", "add", address, "dev", "lan")
    network.run("ip", "link", "set", "lan", "up")


@pytest.fixture
def traveller(linux: LinuxGuest, tmp_path: Path) -> Iterator[Traveller]:
    """Yield the guest, which works as VM `a`."""
    load_modules()
    disk, stream = tmp_path / "disk", Stream()
    disk.write_bytes(b"".join(servers.noise(CONSTANT)) + bytes(WRITTEN * MIB))
    append = "console=ttyS0 quiet panic=-1 nowatchdog vmdtest=shell"
    vm = f"""
vm "a" {{
    disable
    vcpus 2
    memory 144M
    boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "{append}"
    disk "{disk}" format raw
    interface switch "lan"
}}
"""
    (tmp_path / "here").mkdir()
    with Network() as host:
        add_lan(host, f"{HOST}/24")
        with (
            servers.files(host, HOST, {"stream": stream.pieces}),
            NetDaemon(tmp_path / "here", host, conf(vm)) as vmd,
        ):
            vmd.must("start", "a")
            with contextlib.ExitStack() as consoles:
                shell = Shell(consoles.enter_context(vmd.attached("a")), BOOT_S)
                made = Traveller(vmd, disk, stream, shell)
                made.consoles = consoles
                made.begin()
                yield made
            stream.last.set()
        assert ours(host) == []


@pytest.fixture
def elsewhere(traveller: Traveller, tmp_path: Path) -> Iterator[NetDaemon]:
    """Run another daemon on another host, whose switch is in the same network."""
    (tmp_path / "there").mkdir()
    with Network() as other:
        add_lan(other)
        run, its_namespace = traveller.vmd.network.run, f"/proc/{os.getpid()}/fd/{other.fd}"
        run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", its_namespace)
        for network in (traveller.vmd.network, other):
            network.run("ip", "link", "set", "wire", "master", "lan", "up")
        with NetDaemon(tmp_path / "there", other, conf()) as vmd:
            yield vmd
        assert ours(other) == []


@pytest.mark.deep
def test_a_guest_at_work_is_sent(traveller: Traveller) -> None:
    """The guest continues after `vmctl pause a`, `vmctl unpause a`, and `vmctl send a | vmctl receive b`."""
    for command in ("pause", "unpause"):
        traveller.vmd.must(command, "a")
    traveller.works()
    began = time.monotonic()
    sent, _ = move(traveller.vmd, "a", "b")
    traveller.moved("b")
    print(f"{sent.strip()}; in all {time.monotonic() - began:.1f} s")
    traveller.works()
    traveller.finish()


@pytest.mark.deep
@pytest.mark.timeout(1200)
def test_a_guest_at_work_is_sent_often(traveller: Traveller, tmp_path: Path) -> None:
    """The guest is sent back and forth, mostly running, once paused, and through a file across a daemon restart."""
    vmd = traveller.vmd
    here, there = "a", "b"
    for turn in range(2):
        if turn == 1:
            vmd.must("pause", here)
        began = time.monotonic()
        said, _ = move(vmd, here, there, send=("-l", "-r", ROUNDS), timeout_s=LIVE_S)
        print(f"turn {turn}: {time.monotonic() - began:.1f} s: {said.strip()}")
        traveller.moved(there)
        traveller.works()
        here, there = there, here
    traveller.consoles.close()
    to_file(vmd, here, tmp_path / "file")
    assert vmd.stop() == 0
    vmd.start()
    assert from_file(vmd, "c", tmp_path / "file")[0] == 0
    traveller.moved("c")
    traveller.works()
    traveller.finish()


@pytest.mark.deep
@pytest.mark.timeout(1200)
def test_a_guest_at_work_migrates(traveller: Traveller, elsewhere: NetDaemon, tmp_path: Path) -> None:
    """The guest migrates to another host and back while it writes to memory.  Its connection and sums stay right."""
    here, there = traveller.vmd, elsewhere
    for turn in range(2):
        plan = Plan(tmp_path / "plan", there, out_of=here)
        said = here.must("migrate", "-v", "-r", ROUNDS, "-e", plan.command, "a", "other", timeout_s=LIVE_S)
        print(f"turn {turn}: {said.strip().splitlines()[-1]}")
        assert [row["state"] for row in here.rows()] in ([], ["stopped"])
        assert there.status("a")["state"] == "running"
        here, there = there, here
        traveller.vmd = here
        traveller.moved("a")
        traveller.works()
    traveller.finish()
