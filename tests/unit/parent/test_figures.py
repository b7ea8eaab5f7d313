"""The figures of VMs that clients get: they fit into a message, and have paths only for those who control the VM."""

import ast
import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import (
    MAX_DISKS,
    MAX_NICS,
    MAX_VCPUS,
    NAME_MAX,
    Config,
    DiskConfig,
    NicConfig,
    Owner,
    VmConfig,
)
from vmd.devices.vionet.local import NAME_AT
from vmd.errors import OperatorError
from vmd.ipc import devmsg
from vmd.ipc.devfigures import take_slot
from vmd.ipc.figures import (
    CdromFigures,
    DeviceFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
    VcpuFigures,
)
from vmd.ipc.imsg import MAX_MESSAGE, Envelope, Form, encode
from vmd.ipc.messages.clients import Caller, End, FiguresRequest
from vmd.ipc.messages.figures import LifeEnd, VmFigures
from vmd.ipc.routes import Proc
from vmd.memfile import memory_file, sealed_file
from vmd.parent import figures as room
from vmd.parent.core import Core
from vmd.parent.figures import BATCH, Figures, group_of, host_names, slots
from vmd.parent.vm import State
from vmd.record import Record, RecordType
from vmd.vm.kinds import KINDS

MOST = (1 << 64) - 1
ROOT, OTHER = Caller(uid=0, gid=0, pid=1), Caller(uid=77777, gid=77777, pid=1)
TO_COME = 2000  # bytes reserved for fields of later versions


class Control:
    """The channel that answers are sent to."""

    def __init__(self) -> None:
        self.sent: list[Record] = []

    def send(self, message: Record, *, peerid: int = 0, fds: Mapping[str, object]) -> None:
        """Record an answer."""
        assert (peerid, dict(fds)) == (1, {})
        self.sent.append(message)


class Network:
    """A network without interfaces."""

    taps: dict[int, object] = {}

    def counted(self, _vmid: int, _index: int, figures: dict[str, Any]) -> dict[str, Any]:
        """Return the figures that the device process has counted."""
        return figures


class Parent:
    """The part of the parent that the room needs, with VMs `a` and `b` that do not run."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        self.core = Core(cast("Any", self), Config())
        self.control = Control()
        self.core.peers.channels = cast("Any", {Proc.CONTROL: self.control})
        for name in ("a", "b"):
            disk = DiskConfig(path=f"/{name}")
            config = VmConfig(name=name, disks=(disk,), nics=(NicConfig(switch="lan"),), cdrom="/c", vcpus=2)
            self.core.vms.add(config.replace(owner=Owner(uid=4, gid=5)), from_config=True)
        self.room = Figures(self.core, cast("Any", Network()))

    def call_later(self, _delay_s: float, callback: Callable[[], None]) -> None:
        """Record a callback, as the loop."""
        self.later.append(callback)

    def ask(self, request: FiguresRequest, caller: Caller = ROOT) -> list[VmFigures]:
        """Return the rows of the answer."""
        self.room.serve(request, caller, Envelope(request, 1, 0, {}))
        while self.later:
            self.later.pop(0)()
        *rows, end = self.control.sent
        self.control.sent.clear()
        assert end == End()
        return cast("list[VmFigures]", rows)


@pytest.mark.parametrize("record", [VmFigures, GroupFigures, DiskFigures, NicFigures], ids=lambda each: each.__name__)
def test_every_field_is_filled(record: RecordType) -> None:
    """A field that is never filled is of no use.  The counters of devices are filled all together."""
    counted = {name for kind, row in RECORDS.items() if row is record for name in devmsg.FIGURES[kind]}
    nodes = [node for node in ast.walk(ast.parse(Path(room.__file__).read_text())) if isinstance(node, ast.Call)]
    filled = {word.arg for node in nodes if ast.unparse(node.func) == record.__name__ for word in node.keywords}
    missing = set(record.fields) - filled - counted - set(DeviceFigures.fields)

    assert missing == set(), f"vmd/parent/figures.py does not fill {sorted(missing)} of {record.__name__}"


def test_figures_of_all_vms_or_of_one() -> None:
    """One VM is named by name or id.  A VM that does not exist is an error."""
    parent = Parent()
    rows = parent.ask(FiguresRequest())
    assert [row.name for row in rows] == ["a", "b"]
    assert parent.ask(FiguresRequest(name="b")) == [rows[1]]
    assert parent.ask(FiguresRequest(vmid=rows[0].vmid)) == [rows[0]]
    with pytest.raises(OperatorError, match="vm c not found"):
        parent.ask(FiguresRequest(name="c"))


def test_a_vm_that_does_not_run() -> None:
    """The row lists its configured devices, without counts."""
    (row,) = Parent().ask(FiguresRequest(name="a"))
    assert row.vcpus == (VcpuFigures(index=0), VcpuFigures(index=1))
    assert row.disks == (DiskFigures(index=0, path="/a"),)
    assert (row.cdrom, row.entropy) == (CdromFigures(index=0), EntropyFigures(index=0))
    assert [(nic.switch, nic.tap, nic.counted) for nic in row.nics] == [("lan", "", False)]
    assert (row.pid, row.started_s, row.starts, row.ended, row.group) == (0, 0, 0, None, None)


def test_the_rows_of_many_vms_come_in_batches() -> None:
    """Others are served between batches.

    A VM that was removed meanwhile is left out, even if its name is in use again.
    """
    parent = Parent()
    for number in range(3 * BATCH - 2):
        parent.core.vms.add(VmConfig(name=f"n{number}"), from_config=False)
    request = FiguresRequest()
    parent.room.serve(request, ROOT, Envelope(request, 1, 0, {}))
    assert len(parent.control.sent) == BATCH
    parent.core.vms.remove(parent.core.vms.get(0, "n20"))
    parent.core.vms.add(VmConfig(name="n20"), from_config=False)
    turns = 0
    while parent.later:
        parent.later.pop(0)()
        turns += 1
    *rows, end = parent.control.sent
    assert (turns, len(rows), end) == (2, 3 * BATCH - 1, End())


def test_paths_are_for_users_who_may_control_the_vm() -> None:
    """All users get the other fields."""
    parent = Parent()
    (of_root,), (of_other,) = (parent.ask(FiguresRequest(name="a"), caller) for caller in (ROOT, OTHER))
    assert of_other == of_root.replace(disks=(of_root.disks[0].replace(path=""),))


def test_the_processor_time_of_vcpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threads are looked for once in each life of a VM, or until all of them are there."""
    parent = Parent()
    vm = parent.core.vms.get(0, "a")
    names: dict[str, int] = {}
    looked: list[int] = []

    def threads(pid: int) -> dict[str, int]:
        looked.append(pid)
        return names

    def times() -> list[int]:
        (row,) = parent.ask(FiguresRequest(name="a"))
        return [vcpu.cpu_ns for vcpu in row.vcpus]

    monkeypatch.setattr(room, "threads", threads)
    monkeypatch.setattr(room, "thread_ns", lambda pid, thread: pid * 100 + thread)
    assert (times(), looked) == ([0, 0], [])
    vm._state, vm.pid = State.RUNNING, 5
    names["vcpu1"] = 8
    assert (times(), times()) == ([0, 508], [0, 508])
    names["vcpu0"] = 7
    assert (times(), times(), looked) == ([507, 508], [507, 508], [5, 5, 5])
    vm.pid = 6
    assert (times(), times(), looked) == ([607, 608], [607, 608], [5, 5, 5, 6])
    vm._state, vm.pid = State.STOPPED, 0
    assert times() == [0, 0]
    assert parent.room._vcpus == {}
    parent.room._vcpus = {
        vmid: (1, {}) for vmid in range(100, 105)
    }  # VMs that are gone: more than twice as many as are
    times()
    assert parent.room._vcpus == {}


def test_the_figures_of_a_vm_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its processes together.  Limits, disks and interfaces are those that it runs with."""
    parent = Parent()
    vm = parent.core.vms.get(0, "a")
    monkeypatch.setattr(room, "children", lambda pid: [pid + 1, pid + 2])
    for name, factor in (("private_bytes", 10), ("cpu_ns", 100)):
        monkeypatch.setattr(room, name, lambda pid, factor=factor: pid * factor)
    monkeypatch.setattr(room, "guest_bytes", lambda memory: 4096 if memory == -7 else 0)
    monkeypatch.setattr(room, "group_of", lambda _mounts, pid: GroupFigures(cpu_ns=pid))
    vm.memory, vm.started_s = -7, 9.5
    (row,) = parent.ask(FiguresRequest(name="a"))
    assert (row.guest_bytes, row.process_bytes, row.cpu_ns, row.group, row.started_s) == (0, 0, 0, None, 0)
    vm._state, vm.pid = State.RUNNING, 5
    vm.running_config = vm.config.replace(
        cdrom="", memory_bytes=1 << 30, nics=(NicConfig(switch="old", rate_limit=9), NicConfig()),
        disks=(DiskConfig(path="/old", iops_limit=7, rate_limit=8),),
    )  # fmt: skip
    (row,) = parent.ask(FiguresRequest(name="a"))
    assert (row.guest_bytes, row.process_bytes, row.cpu_ns, row.started_s) == (4096, 180, 1800, 9)
    assert row.group == GroupFigures(cpu_ns=5)
    assert (row.cdrom, row.memory_bytes) == (None, 1 << 30)
    assert [(disk.path, disk.iops_limit, disk.rate_limit) for disk in row.disks] == [("/old", 7, 8)]
    assert [(nic.switch, nic.rate_limit) for nic in row.nics] == [("old", 9), ("", 0)]
    vm.running_config = vm.running_config.replace(drive=True)
    (row,) = parent.ask(FiguresRequest(name="a"))
    assert row.cdrom == CdromFigures(index=0)
    vm.memory = None


def test_starts_are_counted() -> None:
    """Starts after a reset by the guest are counted as restarts."""
    parent = Parent()
    vm = parent.core.vms.get(0, "a")
    for again in (False, True, True):
        vm.begin_start(0, again=again)
        vm.guest_resets += again
        vm.ended("", "killed")
    (row,) = parent.ask(FiguresRequest(name="a"))
    assert (row.starts, row.restarts) == (1, 2)
    assert row.ended is not None
    assert row.ended.how == "killed"


def filled(cls: RecordType, **fields: Any) -> Any:  # noqa: ANN401 - of that class
    """Return a record whose numbers have their largest values."""
    return cls(**{name: MOST for name, kind in cls.fields.items() if kind in (int, int | None)} | fields)


def test_the_longest_row_fits_a_message() -> None:
    """It describes a VM with the largest number of everything."""
    path, name, mac = "/" + "\N{SNOWMAN}" * 341, "n" * NAME_MAX, bytes(6)
    row = filled(
        VmFigures,
        name=name,
        state="receiving",
        ended=LifeEnd(at_s=MOST, how="powered off", text="x" * 1500),
        vcpus=(filled(VcpuFigures),) * MAX_VCPUS,
        disks=(filled(DiskFigures, counted=True, path=path),) * MAX_DISKS,
        cdrom=filled(CdromFigures),
        entropy=filled(EntropyFigures),
        nics=(filled(NicFigures, counted=True, tap="t" * 15, switch=name, lladdr=mac),) * MAX_NICS,
        group=filled(GroupFigures),
        limit=filled(LimitFigures),
    )
    packet, _ = encode(row, form=Form.NAMED)
    assert len(packet) <= MAX_MESSAGE - TO_COME


RECORDS = {"vionet": NicFigures, "vioblk": DiskFigures, "vioscsi": CdromFigures, "viornd": EntropyFigures}


def test_each_counter_of_a_device_has_a_field() -> None:
    """The field has the name of the counter.  All counters of a device fit into its slot."""
    assert set(RECORDS) == set(devmsg.FIGURES) == {kind.process for kind in KINDS}
    for kind, names in devmsg.FIGURES.items():
        others = {"index", "counted", "path", "tap", "switch", "lladdr", "iops_limit", "rate_limit"}
        own = set(RECORDS[kind].fields) - others
        assert own == set(names), kind
        assert devmsg.FIGURES_HEAD + len(names) <= devmsg.FIGURES_SLOT_BYTES // 8
    assert MAX_DISKS + MAX_NICS + 2 <= devmsg.FIGURES_SLOTS


def test_figures_keep_their_places() -> None:
    """The VMs of an earlier version write to the same places.  New kinds and new figures are added at the end."""
    golden = Path(__file__).parents[2] / "golden"
    now, before = devmsg.FIGURES, json.loads((golden / "figures-1.json").read_text())

    assert list(now)[: len(before)] == list(before), "a kind was removed, or a new one is not at the end"
    for kind, names in before.items():
        assert list(now[kind])[: len(names)] == names, f"{kind}: a figure was removed, or a new one is not at the end"


@pytest.fixture
def page() -> Iterator[int]:
    """Yield a file of figures."""
    fd = sealed_file("figures", devmsg.FIGURES_BYTES)
    yield fd
    os.close(fd)


def test_the_counters_of_devices_are_found(page: int) -> None:
    """They are found by kind and index, in any slot.  A device with fewer counters is of an earlier version."""
    disk, nic = take_slot(page, 3, "vioblk", 1), take_slot(page, 15, "vionet", 0)
    disk[2], nic[0], nic[devmsg.COUNTER_NAMES.index("tx_throttled_ns")] = 5, 7, MOST
    found = slots(page)
    assert set(found) == {("vioblk", 1), ("vionet", 0)}
    assert {name: value for name, value in found["vioblk", 1].items() if value} == {"read_ns": 5}
    assert {name: value for name, value in found["vionet", 0].items() if value} == {
        "rx_packets": 7, "tx_throttled_ns": MOST,
    }  # fmt: skip
    os.pwrite(page, (2).to_bytes(8, "little"), 15 * devmsg.FIGURES_SLOT_BYTES + 16)
    assert slots(page)["vionet", 0] == {"rx_packets": 7, "rx_bytes": 0}


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b"web.example.org", {3: "web.example.org"}),
        (b"x" * 62 + b".y", {3: "x" * 62 + ".y"}),
        (b"", {}),
        (b"a\0b", {}),
        (b"\x1b[2J", {}),
        (b"\xff" * 64, {}),
    ],
)
def test_the_host_names_of_leases(page: int, raw: bytes, names: dict[int, str]) -> None:
    """They follow the figures of interfaces.  Invalid names are ignored, and a disk has none."""
    for slot, kind in ((2, "vioblk"), (15, "vionet")):
        words = take_slot(page, slot, kind, 3)
        for place, at in enumerate(range(0, devmsg.HOST_NAME_BYTES, 8), NAME_AT):
            words[place] = int.from_bytes(raw[at : at + 8], "little")

    assert host_names(page) == names
    assert not any(slots(page)["vionet", 3].values())


def test_random_figures(page: int) -> None:
    """No figure is too large for the answer.  Slots with invalid contents are ignored."""
    parent = Parent()
    vm = parent.core.vms.get(0, "a")
    vm.begin_start(0)
    vm.begin_run(os.getpid())
    vm.take_figures(os.dup(page))
    noise = random.Random(1)
    for _ in range(200):
        raw = bytearray(noise.randbytes(devmsg.FIGURES_BYTES))
        for slot in range(devmsg.FIGURES_SLOTS):
            at = slot * devmsg.FIGURES_SLOT_BYTES
            index, count = noise.choice((0, 1, MOST)), noise.getrandbits(64)
            raw[at : at + 24] = struct.pack("<QQQ", noise.randrange(7), index, count)
        os.pwrite(page, raw, 0)
        (row,) = parent.ask(FiguresRequest(name="a"))
        assert [disk.index for disk in row.disks] == [0]
        assert len(encode(row, form=Form.NAMED)[0]) < MAX_MESSAGE
    vm.ended("")
    assert vm.figures is None


def test_a_file_that_is_not_sealed(tmp_path: Path) -> None:
    """Such a file is refused, because it could be of any kind, or could be truncated."""
    vm = Parent().core.vms.get(0, "a")
    (tmp_path / "file").write_bytes(bytes(devmsg.FIGURES_BYTES))
    for fd in (os.open(tmp_path / "file", os.O_RDWR), memory_file("figures")):
        vm.take_figures(fd)
        assert vm.figures is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_the_figures_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of a missing controller is None, and so are all figures of a group that is not the VM's own."""
    files = {
        "cpu.stat": "usage_usec 12\nuser_usec 5\nnr_throttled 3\nthrottled_usec 4\nodd\n",
        "memory.current": "4096\n",
        "memory.peak": "max\n",
        "memory.events": "low 0\noom_kill 2\n",
    }
    group = tmp_path / "vm-7"
    group.mkdir()
    for name, text in files.items():
        (group / name).write_text(text)
    where = {"/proc/5/cgroup": "0::/vm-7\n", "/proc/6/cgroup": "0::/vmm\n", "/proc/7/cgroup": ""}
    monkeypatch.setattr("vmd.parent.figures.read", lambda path: where.get(path) or read(path))
    mounts = f"1 2 0:3 / {tmp_path} rw - cgroup2 cgroup rw\n"
    assert group_of(mounts, 5) == GroupFigures(
        cpu_ns=12000, throttled=3, throttled_ns=4000, memory_bytes=4096, oom_kills=2
    )
    assert [group_of(mounts, pid) for pid in (6, 7)] == [None, None]
    assert group_of("", 5) is None


def read(path: str) -> str:
    """Return the contents of a file, or ""."""
    return Path(path).read_text() if Path(path).exists() else ""
