"""When files are opened, by how many openers, how these answer, and how long the parent waits."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import BootDevice, Config, DiskConfig, DiskFile, NicConfig, Owner, Rights, SeedConfig, VmConfig
from vmd.errors import HostError, PeerError, VmdError
from vmd.fileid import FileId
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.holdermsg import Holder
from vmd.ipc.messages.clients import Caller
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenedFile, OpenerAt, OpenFiles
from vmd.ipc.routes import Proc
from vmd.memfile import memory_file
from vmd.parent.access import NOGROUP
from vmd.parent.core import Core
from vmd.parent.opening import (
    AGAIN_S,
    ANSWER_S,
    AT_A_TIME,
    HAND_OVER_S,
    IMGBOOT_ENTRY,
    IMGRESIZE_ENTRY,
    LET_GO_S,
    SEEDER_ENTRY,
    STUCK_MAX,
    STUCK_MAX_OF_ROOT,
    ClientFiles,
    Opened,
    Openings,
    jobs_of,
    replaced,
)
from vmd.parent.vm import Vm
from vmd.privsep.cell import Cell
from vmd.record import Record
from vmd.seed.parts import PARTS_MAX

ROOT, ANNA = 0, 1000


class Timer:
    """A timer that the test fires."""

    def __init__(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Cancel the timer."""
        self.callback = None


class Loop:
    """A loop that keeps timers."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Start a timer."""
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def run(self, until_s: float = 0.0) -> None:
        """Fire the timers that are due."""
        while due := [timer for timer in self.timers if timer.delay_s <= until_s]:
            self.timers = [timer for timer in self.timers if timer not in due]
            for timer in due:
                if timer.callback is not None:
                    timer.callback()


class Child:
    """A process."""

    def __init__(self) -> None:
        self.pidfd = 5
        self.killed = False

    def kill(self) -> None:
        """Note that it was killed."""
        self.killed = True


def can_grow(fd: int) -> bool:
    """Return whether the file can be made larger."""
    try:
        os.ftruncate(fd, os.fstat(fd).st_size + 1)
    except PermissionError:
        return False
    return True


class Channel:
    """The channel to an opener.  It records jobs, and closes their descriptors."""

    def __init__(self, on_lost: Callable[..., None]) -> None:
        self.on_lost = on_lost
        self.peer = Proc.OPENER
        self.label = "opener"
        self.jobs: list[OpenFiles] = []
        self.fds: dict[str, int] = {}
        self.closed = False
        self.memory = (0, True)

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]]) -> None:
        """Record a job."""
        assert isinstance(message, OpenFiles)
        self.jobs.append(message)
        self.fds = {name: len(each) for name, each in fds.items()}
        for name in {"kernel_memory"} & fds.keys():
            self.memory = os.fstat(fds[name][0]).st_size, can_grow(fds[name][0])
        for each in fds.values():
            for fd in each:
                os.close(fd)

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True


class Holders:
    """A lockholder that finds this process, or none."""

    def __init__(self) -> None:
        self.found: Holder | None = None
        self.asked: list[tuple[FileId, tuple[int, ...]]] = []

    def ask(self, file: FileId, marks: tuple[int, ...], done: Callable[[Holder | None], None]) -> None:
        """Answer at once."""
        self.asked.append((file, marks))
        done(self.found)


class Children:
    """Starts no processes.  Those that are `stuck` do not end when they are killed."""

    def __init__(self) -> None:
        self.cell = Cell(12345, 12345, -1, -1)
        self.openers: list[Child] = []
        self.probes: list[Child] = []  # and other processes that openers use
        self.stuck = False
        self.ours: list[int] = []  # pids of processes of the daemon
        self.buried = 0
        self.entries: list[str] = []

    def start(self, proc: Proc, _open_log: object) -> tuple[Child, None]:
        """Return a new child."""
        assert proc is Proc.OPENER
        self.openers.append(Child())
        return self.openers[-1], None

    def start_probe(
        self, _open_log: object, *, entry: str = "", title: str = ""
    ) -> tuple[Child, socket.socket]:
        """Return a new probe, or another process of its kind."""
        self.entries.append(entry)
        ours, theirs = socket.socketpair()
        theirs.close()
        self.probes.append(Child())
        return self.probes[-1], ours

    def are_ours(self, caller: Caller) -> bool:
        """Return whether the pid is one of ours."""
        return caller.pid in self.ours

    def bury(self) -> None:
        """Let all killed children end, unless they are stuck."""
        self.buried += 1
        for child in self.openers:
            if child.killed and not self.stuck:
                child.pidfd = -1


class Room:
    """The room, and the results of openings."""

    def __init__(self) -> None:
        self.loop, self.children = Loop(), Children()
        self.channels: list[Channel] = []
        self.core = Core(cast("Any", self.loop), Config())
        self.openings = Openings(self.core, cast("Any", self.attach))
        self.openings.start(cast("Any", self.children), cast("Any", None))
        self.holders = Holders()
        self.openings.holders = cast("Any", self.holders)
        self.opened: dict[str, Opened] = {}
        self.failed: dict[str, VmdError] = {}

    def attach(self, _sock: object, _peer: Proc, _label: str, *, on_lost: Callable[..., None]) -> Channel:
        """Return the channel to a new opener, as `Process.attach`."""
        self.channels.append(Channel(on_lost))
        return self.channels[-1]

    def begin(self, name: str, user: int = 0, how: dict[str, Any] | None = None, **more: object) -> Vm:
        """Have the files of a VM opened, `how` says how."""
        vm = self.ask(name, user, how, **more)
        self.loop.run()
        return vm

    def ask(self, name: str, user: int = 0, how: dict[str, Any] | None = None, **more: object) -> Vm:
        """Ask for the files of a VM, before the loop runs."""
        config = VmConfig(name=name, disks=(DiskConfig(path=f"/{name}"),)).replace(**more)
        vm = self.core.vms.find(0, name) or self.core.vms.add(config, from_config=True)
        self.openings.open(
            vm,
            config,
            user,
            lambda opened: self.opened.update({name: opened}),
            lambda error: self.failed.update({name: error}),
            **{"boots": True, **(how or {})},
        )
        return vm

    def do(self, vm: Vm, job: OpenFiles) -> None:
        """Have a job done for a change of a VM."""
        self.openings.open_for(
            job,
            vm,
            0,
            job,
            lambda opened: self.opened.update({job.name: opened}),
            lambda error: self.failed.update({job.name: error}),
        )
        self.loop.run()

    def channel(self, name: str) -> Channel:
        """Return the last opener of a VM."""
        return [each for each in self.channels if each.jobs and each.jobs[0].name == name][-1]

    @property
    def at_work(self) -> list[str]:
        """The VMs whose openers have not answered, and were not given up."""
        working = [each for each in self.openings._all.values() if each.opening is not None]
        return sorted({each.opening.vm.name for each in working if each.opening is not None})

    def answer(self, name: str, message: FilesOpened | NotOpened | None = None) -> None:
        """Let the opener of a VM answer, by default with success."""
        channel = cast("Any", self.channel(name))
        if isinstance(message, NotOpened):
            self.openings.on_not_opened(message, channel)
        else:
            self.openings.on_opened(message or FilesOpened(boot_name="bsd"), channel)
        self.loop.run()


@pytest.fixture
def room() -> Iterator[Room]:
    """Yield a room.  Afterwards it may only have the descriptor of the probe in reserve."""
    before = open_descriptors()
    made = Room()
    yield made
    for opened in made.opened.values():
        opened.close()
    for vm in list(made.openings.by_key):
        made.openings.give_up(vm)
    if made.openings.probe is not None:
        made.openings.probe[1].close()
    assert open_descriptors() == before


def test_the_files_of_a_vm_are_opened(room: Room) -> None:
    """The opener in reserve opens them, with a probe.  Its answer has no files; those are in the courier."""
    room.begin("a")
    channel = room.channel("a")
    assert len(room.children.openers) == 1
    assert channel.fds == {"courier": 1, "probe": 1}

    file = OpenedFile(what="disk /a", file=FileId(device=1, inode=2))
    room.answer("a", FilesOpened(files=(file,), notes=("disk /a: is odd",), boot_name="bsd"))

    opened = room.opened["a"]
    assert (opened.files, opened.notes, opened.boot_name) == ({"disk /a": (1, 2)}, ("disk /a: is odd",), "bsd")
    assert len(opened.couriers) == 1
    room.loop.run(0.1)
    assert len(room.children.openers) == 1  # no other opener while the VM starts
    channel.on_lost(channel, None)
    room.loop.run(0.1)
    assert len(room.children.openers) == 2  # in reserve


def test_files_of_a_client_are_opened_with_the_client_s_rights() -> None:
    """Disks that the client has named are in the same job."""
    given = ClientFiles(client=7, user=Owner(uid=ANNA, gid=ANNA), names=("kernel",), check_mode=True)
    config = VmConfig(name="a", disks=(DiskConfig(path="/a"),), rights=Rights(disks=Owner(uid=ANNA, gid=ANNA)))

    (job,) = jobs_of(config, boots=False, given=given, patience_s=0)

    assert (job.uid, job.given, job.check_given, len(job.disks), job.boots) == (ANNA, ("kernel",), True, 1, False)


def test_an_initrd_of_a_client_is_the_only_one() -> None:
    """The job that opens the configured kernel does not open the configured initrd."""
    config = VmConfig(name="a", kernel="/vmlinuz", initrd="/initrd")
    for user, count in ((ANNA, 2), (0, 1)):
        given = ClientFiles(client=7, user=Owner(uid=user, gid=user), names=("initrd",), check_mode=True)
        jobs = jobs_of(config, boots=True, given=given, patience_s=0)
        assert [(job.boots, job.kernel, job.initrd) for job in jobs if job.boots] == [(True, "/vmlinuz", "")]
        assert (len(jobs), [job.given for job in jobs if job.given]) == (count, [("initrd",)])


def test_a_kernel_on_a_disk_is_opened_with_the_disk() -> None:
    """The rights are those of the user who named the disk, not of the one who named the kernel."""
    rights = Rights(disks=Owner(uid=ANNA, gid=ANNA))
    config = VmConfig(
        name="a", kernel="disk0:/k", initrd="disk0p2:/i", disks=(DiskConfig(path="/a"),), cdrom="/c", rights=rights
    )

    disk, disc = jobs_of(config, boots=True, given=None, patience_s=0)

    assert (disk.uid, disk.boots, len(disk.disks)) == (ANNA, False, 1)
    assert (disk.kernel_at, disk.initrd_at) == (
        DiskFile(disk=0, path="/k"), DiskFile(disk=0, partition="p2", path="/i")
    )  # fmt: skip
    assert (disc.uid, disc.boots, disc.cdrom, disc.kernel_at) == (0, False, "/c", None)
    for job in jobs_of(config, boots=False, given=None, patience_s=0):  # received, or another kernel is given
        assert (job.kernel_at, job.initrd_at) == (None, None)


def test_a_kernel_on_a_disk_is_read_by_a_process_of_its_own(room: Room) -> None:
    """It gets memory that cannot grow larger than the guest's memory."""
    room.begin("a", kernel="disk0:/k", memory_bytes=16 << 20)

    channel = room.channel("a")
    assert channel.fds == {"courier": 1, "probe": 1, "reader": 1, "kernel_memory": 1}
    assert channel.memory == (16 << 20, False)
    assert room.children.entries.count(IMGBOOT_ENTRY) == 1


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, True),
        ({"boot_device": BootDevice.NET}, True),
        ({"cdrom": "/c"}, False),
        ({"drive": True}, False),
        ({"cdrom": "/c", "boot_device": BootDevice.CDROM}, False),
        ({"cdrom": "/c", "boot_device": BootDevice.DISK}, True),
        ({"kernel": "/k"}, False),
        ({"kernel": "disk0:/k"}, False),
    ],
)
def test_when_the_firmware_needs_a_bootable_disk(fields: dict[str, Any], needed: bool) -> None:
    """In these cases the opener checks for a boot sector."""
    config = VmConfig(name="a", disks=(DiskConfig(path="/a"),)).replace(**fields)

    assert any(job.needs_code for job in jobs_of(config, boots=True, given=None, patience_s=0)) == needed
    assert not any(job.needs_code for job in jobs_of(config, boots=False, given=None, patience_s=0))


def test_a_disk_without_a_boot_sector(room: Room) -> None:
    """A second opener, whose process knows file systems, examines it.  Its message is the answer."""
    room.begin("a")
    (job,) = room.channel("a").jobs
    assert (job.needs_code, job.looks, IMGBOOT_ENTRY in room.children.entries) == (True, False, False)

    room.answer("a", NotOpened(code=errno.ENOEXEC, text="no boot sector", no_code=True))
    assert room.failed == {}
    (job,) = room.channel("a").jobs
    assert (job.looks, room.channel("a").fds) == (True, {"courier": 1, "probe": 1, "reader": 1})

    room.answer("a", NotOpened(code=errno.ENOEXEC, text="no boot sector on disk /a: MBR", no_code=True))
    assert str(room.failed["a"]) == "no boot sector on disk /a: MBR"
    assert room.at_work == []


def test_a_host_without_free_descriptors(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails, and leaves no descriptor open."""

    def pair() -> tuple[socket.socket, socket.socket]:
        raise HostError("make a courier", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))

    monkeypatch.setattr("vmd.ipc.courier.pair", pair)
    room.begin("a", ANNA)
    assert str(room.failed["a"]) == "make a courier: Too many open files"
    assert room.at_work == []


def test_an_opener_that_fails(room: Room) -> None:
    """Its message is the answer, and the next opener starts."""
    room.begin("a1", ANNA)
    room.begin("a2", ANNA)
    room.answer("a1", NotOpened(code=errno.ENOENT, text="disk /a1: No such file or directory"))
    assert str(room.failed["a1"]) == "disk /a1: No such file or directory"
    assert room.at_work == ["a2"]


def test_an_opener_that_does_not_answer_is_given_up(room: Room) -> None:
    """The message names the file that it opens.  Each of its messages gives it more time, up to a limit."""
    room.begin("a", ANNA)
    channel = room.channel("a")
    room.openings.on_at(OpenerAt(what="disk /a: backing file /b"), cast("Any", channel))
    assert room.failed == {}

    room.loop.run(60.0)

    assert str(room.failed["a"]) == "disk /a: backing file /b: does not answer"
    assert (channel.closed, room.children.openers[0].killed) == (True, True)
    assert room.at_work == []


def test_the_time_of_an_opener_is_limited(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other openings wait for their turn."""
    room.begin("a", ANNA)
    now_s = time.monotonic()
    monkeypatch.setattr("vmd.parent.opening.time.monotonic", lambda: now_s + 299.0)
    room.openings.on_at(OpenerAt(what="kernel"), cast("Any", room.channel("a")))

    room.loop.run(2.0)

    assert "does not answer" in str(room.failed["a"])


def test_an_answer_of_an_opener_without_a_job_is_an_error(room: Room) -> None:
    """This holds for the opener in reserve, and for one that has answered."""
    with pytest.raises(PeerError, match="a request that was not made"):
        room.openings.on_opened(FilesOpened(), cast("Any", room.channels[0]))
    room.begin("a")
    room.answer("a")
    with pytest.raises(PeerError, match="a request that was not made"):
        room.openings.on_at(OpenerAt(what="x"), cast("Any", room.channel("a")))


def test_a_vm_that_uses_the_file_is_named(room: Room) -> None:
    """It is found by device and inode, which the opener reports after a failed lock."""
    other = room.core.vms.add(VmConfig(name="other"), from_config=True)
    other.begin_start(0)
    other.files = {"disk /x": (1, 2)}
    for name, inode, by in (("a", 2, "vm other"), ("b", 3, "another process")):
        room.begin(name)
        file = FileId(device=1, inode=inode)
        text = f"disk /{name}: is in use by another process"
        room.answer(name, NotOpened(code=errno.EBUSY, text=text, file=file, what=f"disk /{name}", by="another process"))
        assert str(room.failed[name]) == f"disk /{name}: is in use by {by}"


def test_another_file_under_the_same_name_is_found() -> None:
    """A name that was not there before is not counted."""
    assert replaced({"disk a": (1, 2), "disk b": (1, 3)}, {"disk a": (1, 4), "disk b": (1, 3), "disk c": (1, 5)}) == [
        "disk a"
    ]


# --- turns -----------------------------------------------------------------------------------------------


def test_openings_of_a_user_run_one_at_a_time(room: Room) -> None:
    """They run in order.  One that is given up does not delay the others."""
    room.begin("a", ANNA)
    second = room.begin("b", ANNA)
    room.begin("c", ANNA)
    assert room.at_work == ["a"]
    assert room.openings.give_up(second)
    room.answer("a")
    assert room.at_work == ["c"]
    room.answer("c")
    assert ([*room.opened], room.failed) == (["a", "c"], {})


def test_the_number_of_users_at_a_time_is_limited(room: Room) -> None:
    """Root's openings begin at once, in any number, and do not count."""
    for number in range(AT_A_TIME + 1):
        room.begin(f"u{number}", ANNA + number)
    for number in range(5):
        room.begin(f"r{number}", ROOT)
    assert room.at_work == [*(f"r{number}" for number in range(5)), *(f"u{number}" for number in range(AT_A_TIME))]
    room.answer("r0")
    assert f"u{AT_A_TIME}" not in room.at_work
    room.answer("u0")
    assert f"u{AT_A_TIME}" in room.at_work


def test_files_named_by_two_users_are_opened_by_two_openers(room: Room) -> None:
    """Each job has its user's rights.  The VM continues after the last answer."""
    room.begin("two", ROOT, rights=Rights(disks=Owner(uid=2000, gid=2000)))
    first, second = (channel for channel in room.channels if channel.jobs)
    jobs = [*first.jobs, *second.jobs]
    assert [(job.uid, job.boots, len(job.disks)) for job in jobs] == [(0, True, 0), (2000, False, 1)]
    room.openings.on_opened(FilesOpened(), cast("Any", first))
    assert not room.opened
    room.openings.on_opened(FilesOpened(), cast("Any", second))
    assert [*room.opened] == ["two"]


@pytest.mark.parametrize(("user", "most"), [(ANNA, STUCK_MAX), (ROOT, STUCK_MAX_OF_ROOT)])
def test_the_number_of_openers_that_do_not_end_is_limited(
    room: Room, monkeypatch: pytest.MonkeyPatch, user: int, most: int
) -> None:
    """At the limit a user is refused at once.  Other users are served, and so is this one after one has ended."""
    room.children.stuck = True
    for number in range(most):
        assert room.openings.give_up(room.begin(f"stuck{number}", user))
    assert all(child.killed for child in room.children.openers)
    later_s = time.monotonic() + AGAIN_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    room.begin("more", user)
    room.begin("other", 3000)
    assert {name: str(error) for name, error in room.failed.items()} == {
        "more": f"{most} processes that were to open files for uid {user} do not end: their storage does not answer"
    }
    room.children.openers[0].pidfd = -1
    room.begin("again", user)
    assert room.at_work == ["again", "other"]


def test_root_does_not_count_in_a_turn(room: Room) -> None:
    """This holds for openings that begin in the same turn, too, and while one of root is at work."""
    room.begin("r0", ROOT)
    room.ask("r1", ROOT)
    for number in range(AT_A_TIME):
        room.ask(f"u{number}", ANNA + number)
    room.loop.run()
    assert room.at_work == ["r0", "r1", *(f"u{number}" for number in range(AT_A_TIME))]


def test_a_later_opening_for_the_same_vm_replaces_the_first(room: Room) -> None:
    """The opener of the first is ended, and its answer is to nothing."""
    room.begin("a")
    first = room.channel("a")
    room.begin("a")
    assert first.closed
    assert room.channel("a") is not first
    assert (room.at_work, room.opened, room.failed) == (["a"], {}, {})


def test_openers_that_were_just_killed_may_still_end(room: Room) -> None:
    """A user who gives up some starts at once may go on."""
    room.children.stuck = True
    for number in range(STUCK_MAX):
        room.openings.give_up(room.begin(f"stuck{number}", ANNA))
    room.begin("more", ANNA)
    assert room.at_work == ["more"]
    before = room.children.buried
    room.loop.run(AGAIN_S)
    assert room.children.buried > before


# --- what an opener gets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "fds", "entries"),
    [
        ({"kernel": "disk0:/k", "initrd": "disk0:/i"}, {"reader", "kernel_memory", "initrd_memory"}, [IMGBOOT_ENTRY]),
        ({"kernel": "disk0:/k"}, {"reader", "kernel_memory"}, [IMGBOOT_ENTRY]),
        ({"kernel": "/k"}, set(), []),
    ],
)
def test_boot_files_on_a_disk_get_memory(
    room: Room, fields: dict[str, Any], fds: set[str], entries: list[str]
) -> None:
    """No file gets more than 1 GiB, however large the guest is.  The reserve has a probe, so that none is started."""
    room.begin("a", memory_bytes=8 << 30, **fields)
    jobs = [channel for channel in room.channels if any(job.disks for job in channel.jobs)]
    assert [set(channel.fds) for channel in jobs] == [{"courier", "probe", *fds}]
    assert room.children.entries == ["", *entries]
    if fds:
        assert jobs[0].memory == (1 << 30, False)


def test_a_probe_in_reserve_that_has_ended_is_not_used(room: Room) -> None:
    """Another one is started for the opening."""
    room.children.probes[0].pidfd = -1
    room.begin("a")
    assert (len(room.children.probes), room.channel("a").fds) == (2, {"courier": 1, "probe": 1})


def test_what_the_jobs_of_changes_get(room: Room) -> None:
    """A new size is given by an imgresize.  A check of rights needs no probe, as nothing is read."""
    vm = room.begin("a")
    disks = (DiskConfig(path="/a"),)
    user: dict[str, Any] = {"uid": 0, "gid": 0, "groups": ()}
    for job, fds in (
        (OpenFiles(name="size", disks=disks, resize_bytes=1, **user), {"probe", "resizer", "courier"}),
        (OpenFiles(name="check", disks=disks, only_writable=True, **user), {"courier"}),
        (OpenFiles(name="disc", cdrom="/c", **user), {"probe", "courier"}),
        (OpenFiles(name="none", **user), {"courier"}),
    ):
        room.do(vm, job)
        channel = room.channel(job.name)
        assert (set(channel.fds), channel.label) == (fds, f"opener/{job.name}")
        assert room.openings.vm_of(cast("Any", channel)) == vm.vmid
    assert room.children.entries.count(IMGRESIZE_ENTRY) == 1
    assert room.at_work == ["a"]  # its own opening goes on
    room.answer("size")
    room.answer("disc", NotOpened(code=errno.ENOENT, text="cdrom /c: No such file or directory"))
    assert (list(room.opened), list(room.failed)) == (["size"], ["disc"])
    assert room.openings.vm_of(cast("Any", room.channel("size"))) == 0


class Control:
    """The channel to control.  It closes descriptors."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def send(self, _message: Record, *, peerid: int = 0, fds: dict[str, list[int]]) -> None:
        """Record whose files are passed."""
        self.sent.append(peerid)
        for each in fds.values():
            for fd in each:
                os.close(fd)


def test_files_of_a_client_come_from_its_control(room: Room) -> None:
    """The opener gets a courier from there, and duplicates of the memory for copies, which the VM keeps."""
    control = Control()
    room.core.peers.channels = cast("Any", {Proc.CONTROL: control})
    copy = memory_file("kernel")
    given = ClientFiles(
        client=7, user=Owner(uid=0, gid=0), names=("kernel",), check_mode=True, copies={"kernel": copy}, copy_max=5
    )
    room.begin("a", how={"boots": False, "given": given})
    (job,) = room.channel("a").jobs
    assert room.channel("a").fds == {"courier": 1, "probe": 1, "client": 1, "kernel_copy": 1}
    assert (job.given, job.check_given, job.copy_max, control.sent) == (("kernel",), True, 5, [7])
    os.close(copy)


def test_a_seed_is_made_by_a_seeder(room: Room) -> None:
    """Its memory is the VM's, and the opener gets a duplicate."""
    seed = memory_file("seed")
    room.begin("a", how={"seed_fd": seed}, seed=SeedConfig())
    assert room.channel("a").fds == {"courier": 1, "probe": 1, "seeder": 1, "seed_parts": 1, "seed_made": 1}
    assert room.children.entries.count(SEEDER_ENTRY) == 1
    os.close(seed)


def test_a_seed_is_read_with_the_rights_of_the_user_who_named_it() -> None:
    """A seed that a client gives is read with the client's rights.  It is for all interfaces of the VM."""
    anna, owner = Owner(uid=ANNA, gid=ANNA), Owner(uid=2000, gid=2000)
    nics = (NicConfig(lladdr=b"\2aaaaa"), NicConfig(lladdr=b"\2bbbbb"))
    config = VmConfig(name="a_b", nics=nics, seed=SeedConfig(user="u"), rights=Rights(seed=owner))
    for names, uid, seed_uid in (((), 0, 2000), (("kernel",), ANNA, 2000), (("seed",), ANNA, ANNA)):
        given = ClientFiles(client=7, user=anna, names=names, check_mode=True, copy_max=9) if names else None
        jobs = jobs_of(config, boots=False, given=given, patience_s=0, seeds=True)
        (job,) = [job for job in jobs if job.seed is not None]
        assert (job.uid, job.lladdrs, job.copy_max) == (seed_uid, (b"\2aaaaa", b"\2bbbbb"), PARTS_MAX)
        assert job.seed == SeedConfig(user="u", hostname="a-b")
        assert {job.uid for job in jobs} == ({uid, seed_uid} if names else {seed_uid})
    (job,) = jobs_of(config.replace(seed=SeedConfig(hostname="h")), boots=False, given=None, patience_s=0, seeds=True)
    assert job.seed == SeedConfig(hostname="h")
    larger = ClientFiles(client=7, user=anna, names=("seed",), check_mode=True, copy_max=PARTS_MAX + 1)
    assert jobs_of(config, boots=False, given=larger, patience_s=0, seeds=True)[0].copy_max == PARTS_MAX + 1


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        (None, (0, 0, ())),
        (Owner(uid=0, gid=5), (0, 0, ())),
        (Owner(uid=54321, gid=7), (54321, 7, (7,))),
        (Owner(uid=54321, gid=None), (54321, NOGROUP, (NOGROUP,))),
    ],
)
def test_an_opener_becomes_the_user(owner: Owner | None, ids: tuple[int, int, tuple[int, ...]]) -> None:
    """A user who is not in the user database has the group of their connection only."""
    config = VmConfig(name="a", disks=(DiskConfig(path="/a"),), rights=Rights(disks=owner))
    (job,) = jobs_of(config, boots=False, given=None, patience_s=0)
    assert (job.uid, job.gid, job.groups) == ids


def test_disks_that_others_have_or_that_need_mending(room: Room) -> None:
    """The opener is told to accept them only if the caller says so."""
    for name, how in (("a", {}), ("b", {"others_have": True}), ("c", {"mends": True})):
        room.begin(name, how={"patience_s": 2.5, **how})
        (job,) = room.channel(name).jobs
        assert (job.others_have, job.mends, job.patience_s) == (name == "b", name == "c", 2.5)


# --- how long it takes -----------------------------------------------------------------------------------


def test_a_vm_has_longer_to_fetch_its_files(room: Room) -> None:
    """The VM waits for its interfaces and its process.  Then the opener is ended, which closes the files."""
    room.begin("a")
    room.answer("a", FilesOpened(boot_name="bsd", boot_options="-s", unused=("disk /a",)))
    assert (room.opened["a"].boot_options, room.opened["a"].unused) == ("-s", ("disk /a",))
    room.loop.run(HAND_OVER_S - 1)
    assert (room.channel("a").closed, room.children.openers[0].killed) == (False, False)
    room.loop.run(HAND_OVER_S)
    assert (room.channel("a").closed, room.children.openers[0].killed, room.failed) == (True, True, {})


def test_openers_do_not_outlive_their_vm(room: Room) -> None:
    """One that hangs with the files of a VM would keep their locks, so that the VM could not be started again."""
    for name in ("a", "b", "c"):
        room.begin(name)
    for name in ("a", "b"):
        room.answer(name)
    room.openings.vm_ended(room.core.vms.get(0, "a"))
    room.openings.vm_ended(room.core.vms.get(0, "c"))

    assert [room.channel(name).closed for name in ("a", "b", "c")] == [True, False, False]
    assert [opener.killed for opener in room.children.openers[:3]] == [True, False, False]
    assert (room.at_work, room.failed) == (["c"], {})


def test_an_opener_may_wait_for_locks(room: Room) -> None:
    """That time is added to the time for an answer, from the beginning and with each further file."""
    room.begin("a", how={"patience_s": 40.0})
    for at in ("disk /a", "cdrom /c"):
        room.loop.run(ANSWER_S + 39)
        assert room.failed == {}
        room.openings.on_at(OpenerAt(what=at), cast("Any", room.channel("a")))
    room.loop.run(ANSWER_S + 40)
    assert str(room.failed["a"]) == "cdrom /c: does not answer"


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "pass on memory for a boot file: Too many open files"),
        (ValueError("70000 bytes"), "configuration too long: 70000 bytes"),
        (KeyError("our fault"), OUR_FAULT),
    ],
)
def test_a_job_that_cannot_be_given(
    room: Room, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    """The VM gets an error and does not wait for ever.  Its opener is ended."""

    def send(channel: Channel, message: OpenFiles, *, fds: dict[str, list[int]]) -> None:
        channel.jobs.append(message)
        for each in fds.values():
            os.close(each[0])
        raise error

    monkeypatch.setattr(Channel, "send", send)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            room.begin("a", ANNA)
    else:
        room.begin("a", ANNA)
    assert str(room.failed["a"]) == text
    assert (room.at_work, room.channel("a").closed) == ([], True)


def test_a_result_that_cannot_be_used(room: Room) -> None:
    """The VM gets an error, and the files are closed."""
    vm = room.core.vms.add(VmConfig(name="a", disks=(DiskConfig(path="/a"),)), from_config=True)
    kept: list[Opened] = []

    def on_opened(opened: Opened) -> None:
        kept.append(opened)
        raise KeyError("our fault")

    room.openings.open(
        vm, vm.config, ROOT, on_opened, lambda error: room.failed.update({"a": error}), boots=True
    )
    room.loop.run()
    with pytest.raises(KeyError):
        room.answer("a")
    assert (str(room.failed["a"]), kept[0].couriers) == (OUR_FAULT, [])


def test_an_opener_that_ends_early(room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    """The error names the file that it was opening, and the log has the loss.  Helpers are ended."""
    room.begin("a", ANNA)
    room.begin("b", ANNA)
    channel = room.channel("a")
    channel.on_lost(channel, None)
    assert str(room.failed["a"]) == "its files: its opener has ended: Input/output error"
    assert capfd.readouterr().err == "vmd: lost opener/a\n"
    assert room.children.probes[0].killed
    room.loop.run()
    assert room.at_work == ["b"]


def test_an_opener_in_reserve_that_ends(room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    """Another one takes its place, after a while: if they all end, the daemon has other work to do."""
    channel = room.channels[0]
    channel.on_lost(channel, None)
    assert room.openings.reserve is None
    room.loop.run(AGAIN_S - 0.1)
    assert len(room.channels) == 1
    room.loop.run(AGAIN_S)
    assert (len(room.channels), room.openings.reserve is not None) == (2, True)
    assert (room.failed, capfd.readouterr().err) == ({}, "")


def test_an_opener_in_reserve_that_has_ended_is_forgotten(room: Room) -> None:
    """It counts for nobody.  A daemon may have many of them in its life."""
    room.channels[0].on_lost(room.channels[0], None)
    room.loop.run(AGAIN_S)
    room.begin("a", ROOT)
    assert room.openings._ended == {}


def test_the_reserve_is_not_filled_while_the_daemon_ends(room: Room) -> None:
    """All openers and the probe are ended."""
    room.begin("a")
    room.loop.run(AGAIN_S)
    room.core.ending = True
    room.openings.close()
    assert all(child.killed for child in (*room.children.openers, *room.children.probes))
    count = len(room.children.openers)
    room.loop.run(HAND_OVER_S)
    assert len(room.children.openers) == count


def test_a_host_that_cannot_have_a_reserve(room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    """A warning says why, and starts go on: the processes are started when they are needed."""
    children = cast("Any", room.children)
    start, children.start = children.start, no_process
    room.openings.reserve = None
    room.openings._fill_reserve()
    assert capfd.readouterr().err == "vmd: no opener in reserve: start a process: Cannot allocate memory\n"
    children.start = start
    room.begin("a")
    assert room.at_work == ["a"]


def no_process(*_given: object) -> None:
    """Fail as a host without memory."""
    raise HostError("start a process", errno.ENOMEM)


def test_only_the_disks_without_code_are_looked_at(room: Room) -> None:
    """The other openers of the VM end.  The new one waits for the locks of the first."""
    room.begin("a", cdrom="/c", boot_device=BootDevice.DISK, rights=Rights(cdrom=Owner(uid=2000, gid=2000)))
    first = [channel for channel in room.channels if channel.jobs]
    assert [(channel.jobs[0].needs_code, bool(channel.jobs[0].disks)) for channel in first] == [
        (True, True), (False, False)
    ]  # fmt: skip
    room.openings.on_not_opened(NotOpened(code=errno.ENOEXEC, text="no code", no_code=True), cast("Any", first[0]))
    assert all(channel.closed for channel in first)
    (last,) = [channel for channel in room.channels if channel.jobs and channel not in first]
    (job,) = last.jobs
    assert (job.looks, job.cdrom, job.given, job.seed, job.patience_s) == (True, "", (), None, LET_GO_S)
    room.loop.run()
    assert room.at_work == ["a"]


HOLDER = Holder(pid=77, uid=ANNA, program="qemu")


@pytest.mark.parametrize(
    ("user", "ours", "by"),
    [
        (ROOT, [], '"qemu" (pid 77, user 54321)'),
        (ANNA, [], '"qemu" (user 54321)'),
        (ROOT, [77], "vm other"),
    ],
)
def test_the_holder_of_a_lock_is_named(room: Room, user: int, ours: list[int], by: str) -> None:
    """It is a VM of this host if the process is the daemon's.  Only root is told a pid."""
    other = room.core.vms.add(VmConfig(name="other"), from_config=True)
    other.begin_start(0)
    other.files = {"disk /a": (1, 2)}
    room.holders.found, room.children.ours = HOLDER.replace(uid=54321), ours
    room.begin("a", user)
    refused = NotOpened(
        code=errno.EBUSY, text="-", file=FileId(device=1, inode=2), what="disk /a", by="another process",
        doing=", which writes to it", marks=(5,),
    )  # fmt: skip
    room.answer("a", refused)
    assert str(room.failed["a"]) == f"disk /a: is in use by {by}, which writes to it"
    assert room.holders.asked == [(FileId(device=1, inode=2), (5,))]
    assert room.channel("a").closed

    room.begin("b", user, how={"names_holder": False})
    room.answer("b", refused)
    assert str(room.failed["b"]) == "disk /a: is in use by another process, which writes to it"
    assert len(room.holders.asked) == 1


def test_a_change_may_find_its_own_vm(room: Room) -> None:
    """The start of a VM does not name the VM itself, but a change of its disks does."""
    vm = room.begin("a")
    vm.begin_start(0)
    vm.files = {"disk /a": (1, 2)}
    refused = NotOpened(
        code=errno.EBUSY, text="-", file=FileId(device=1, inode=2), what="disk /a", by="another process"
    )
    room.do(vm, OpenFiles(name="change", uid=0, gid=0, groups=(), disks=(DiskConfig(path="/a"),)))
    room.answer("change", refused)
    assert str(room.failed["change"]) == "disk /a: is in use by vm a"
    room.answer("a", refused)
    assert str(room.failed["a"]) == "disk /a: is in use by another process"
