"""When files are opened, by how many openers, how these answer, and how long the parent waits."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import BootDevice, Config, DiskConfig, DiskFile, Owner, Rights, VmConfig
from vmd.errors import HostError, PeerError, VmdError
from vmd.fileid import FileId
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenedFile, OpenerAt, OpenFiles
from vmd.ipc.routes import Proc
from vmd.parent.core import Core
from vmd.parent.opening import (
    AGAIN_S,
    AT_A_TIME,
    IMGBOOT_ENTRY,
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
    """A lockholder that finds no process."""

    def ask(self, _device: int, _inode: int, done: Callable[[None], None]) -> None:
        """Answer None."""
        done(None)


class Children:
    """Starts no processes.  Those that are `stuck` do not end when they are killed."""

    def __init__(self) -> None:
        self.cell = Cell(12345, 12345, -1, -1)
        self.openers: list[Child] = []
        self.stuck = False
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
        return Child(), ours

    def bury(self) -> None:
        """Let all killed children end, unless they are stuck."""
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
        self.openings.holders = cast("Any", Holders())
        self.opened: dict[str, Opened] = {}
        self.failed: dict[str, VmdError] = {}

    def attach(self, _sock: object, _peer: Proc, _label: str, *, on_lost: Callable[..., None]) -> Channel:
        """Return the channel to a new opener, as `Process.attach`."""
        self.channels.append(Channel(on_lost))
        return self.channels[-1]

    def begin(self, name: str, user: int = 0, **more: object) -> Vm:
        """Have the files of a VM opened."""
        config = VmConfig(name=name, disks=(DiskConfig(path=f"/{name}"),)).replace(**more)
        vm = self.core.vms.find(0, name) or self.core.vms.add(config, from_config=True)
        self.openings.open(
            vm,
            config,
            user,
            lambda opened: self.opened.update({name: opened}),
            lambda error: self.failed.update({name: error}),
            boots=True,
        )
        self.loop.run()
        return vm

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
