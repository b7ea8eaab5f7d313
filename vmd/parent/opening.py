"""The files of VMs are opened by other processes, which may be lost (`vmd/opener`).

An operation on a path or file that users have chosen can wait for dead storage for ever, and SIGKILL does not end that.
So the parent does none of them.  An opener does, for one VM and with the rights of one user.  It answers with words and
numbers; the files go over a courier to the VM's process.  Files that need the rights of two users take two openers.

An opening ends when all its openers have answered, or when one of them is silent for too long.  Openers that hang are
not waited for.  One opener and one imgprobe are in reserve, so that a start does not wait for a new interpreter.
"""

import errno
import os
import time
import types

from vmd.closing import close_all
from vmd.config import rules
from vmd.config.model import BootDevice, Owner
from vmd.errors import HostError, InUse, OperatorError, PeerError, VmdError
from vmd.ipc import courier
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.messages.clients import Caller
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenedFile, OpenerAt, OpenFiles
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.memfile import bounded_file, memory_file
from vmd.parent.access import NOGROUP, groups_of
from vmd.parent.holders import Holders, in_words
from vmd.privsep.cell import LockholderCell
from vmd.record import Record
from vmd.seed.parts import PARTS_MAX
from vmd.seed.rules import hostname_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmd.config.model import VmConfig
    from vmd.ipc.channel import Channel
    from vmd.ipc.holdermsg import Holder
    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.shared import DiskImages
    from vmd.parent.children import Children
    from vmd.parent.connections import Attach
    from vmd.parent.core import Core
    from vmd.parent.vm import Files, Vm
    from vmd.privsep.spawn import Child

ANSWER_S = 30.0  # for one file to be opened
LONGEST_S = 300.0  # for all files of an opening: other openings may wait for their turn
HAND_OVER_S = 300.0  # for a VM to fetch its files: first it waits for its interfaces and its process
SOON_S = 0.1  # a killed opener has usually ended by then
AGAIN_S = 2.0  # until a killed opener is looked at again, and until the reserve is filled again
RESERVE_DELAY_S = 0.03  # after the end of an opener: the VM that starts needs the processor first
LET_GO_S = 5.0  # for the locks of an opener that has ended
AT_A_TIME = 8  # users, except root, whose openings run at the same time
IMGRESIZE_ENTRY = "vmd.images.resize:main"
SEEDER_ENTRY = "vmd.seed.seeder:main"
IMGBOOT_ENTRY = "vmd.imgboot.main:main"
BOOT_FILE_MAX = 1 << 30  # bytes of a kernel or initrd on a disk; the guest's memory is a limit, too
STUCK_MAX, STUCK_MAX_OF_ROOT = 4, 64  # openers of a user that were given up but have not ended


class ClientFiles(Record):
    """Files that a client has opened for a start: a kernel, an initrd, the source of a seed."""

    client: int  # number of the connection, whose control holds the files
    user: Owner  # the files are taken by an opener with the rights of this user
    names: tuple[str, ...]  # some of kernel, initrd, seed
    check_mode: bool  # the user must be allowed to read the files, by their modes
    copies: "Mapping[str, int]" = types.MappingProxyType({})  # empty memory files for copies; the VM owns them
    copy_max: int = 0  # bytes


class Opened:
    """The result of an opening.  Owns its couriers."""

    def __init__(self) -> None:
        self.disks: tuple[DiskImages, ...] = ()
        self.files: Files = {}
        self.notes: tuple[str, ...] = ()
        self.boot_name = ""
        self.boot_options = ""  # of boot(8)
        self.in_use: tuple[OpenedFile, ...] = ()  # disks that another process has locked
        self.unused: tuple[str, ...] = ()  # disks that no other process has locked
        self.couriers: list[int] = []  # the ends for the VM process

    def take_couriers(self) -> list[int]:
        """Return the couriers for the VM process; the caller owns them."""
        fds, self.couriers = self.couriers, []
        return fds

    def close(self) -> None:
        """Close the couriers.  The openers then close the files."""
        close_all(self.take_couriers())


def replaced(before: "Files", now: "Files") -> list[str]:
    """Return the names of files that were replaced: the same path is another file now."""
    return [what for what, file in now.items() if before.get(what, file) != file]


class Opener:
    """An opener process and its current job."""

    def __init__(self, child: "Child") -> None:
        self.child = child
        self.channel: Channel
        self.helpers: list[Child] = []  # processes that it uses, such as an imgprobe
        self.opening: Opening | None = None  # until it has answered
        self.vm: Vm | None = None  # for which it opens files
        self.user = 0  # who has asked for the opening
        self.at = "its files"  # the file that it is opening, for errors
        self.deadline: Timer | None = None


class Opening:
    """The files of one VM, or of one change of a VM, while they are opened.

    Either `on_opened` or `on_failed` is called once, after `Openings.open` has returned.  If the opening is given up,
    neither is called.
    """

    def __init__(
        self,
        vm: "Vm",
        user: int,
        jobs: list[OpenFiles],
        given: ClientFiles | None,
        on_opened: "Callable[[Opened], None]",
        on_failed: "Callable[[VmdError], None]",
        *,
        names_holder: bool,
        key: object,
        seed_fd: int = -1,
    ) -> None:
        self.vm = vm
        self.seed_fd = seed_fd  # an empty memory file for a new seed; the VM owns it
        self.key = key  # the VM itself, or a change of it
        self.user = user  # who has asked for the opening
        self.jobs = jobs
        self.on_opened = on_opened
        self.on_failed = on_failed
        self.names_holder = names_holder  # an error about a lock says who has it
        self.openers: list[Opener] = []  # that have not answered yet
        self.given = given
        self.boot_max = BOOT_FILE_MAX
        self.looks = False  # the disks are not bootable: find out what is on them, for the error
        self.opened = Opened()
        self.began_s = 0.0


class Openings:
    """The room of opening files."""

    def __init__(self, core: "Core", attach: "Attach") -> None:
        self.core = core
        self.loop = core.loop
        self.attach = attach
        self.children: Children
        self.open_log: Callable[[str], socket.socket]
        self.holders: Holders
        self.by_key: dict[object, Opening] = {}
        self.waiting: list[Opening] = []  # for their turn
        self.reserve: Opener | None = None
        self.probe: tuple[Child, socket.socket] | None = None  # in reserve
        self._all: dict[Channel, Opener] = {}
        self._ended: dict[int, list[tuple[Child, float]]] = {}  # by user: killed openers and when; some may hang

    # --- processes ---------------------------------------------------------------------------------------

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Start the processes in reserve; `open_log` makes the socket for the log lines of a process."""
        self.children, self.open_log = children, open_log
        self.holders = Holders(self.loop, LockholderCell(children.cell), open_log)
        self._fill_reserve()

    def _fill_reserve(self) -> None:
        if self.core.ending:
            return
        try:
            if self.reserve is None:
                self.reserve = self._new()
            if self.probe is None:
                self.probe = self.children.start_probe(self.open_log)
        except VmdError as error:  # without a reserve they are started when they are needed
            log.warn(f"no opener in reserve: {error}")

    def _new(self) -> Opener:
        """Start an opener.  Raises HostError."""
        child, ours = self.children.start(Proc.OPENER, self.open_log)
        opener = Opener(child)
        opener.channel = self.attach(ours, Proc.OPENER, "opener", on_lost=self._on_lost)
        self._all[opener.channel] = opener
        return opener

    def _take_probe(self) -> "tuple[Child, socket.socket]":
        """Return a living imgprobe and our end of its socket.  Raises HostError."""
        self.children.bury()
        probe, self.probe = self.probe, None
        if probe is not None and probe[0].pidfd >= 0:
            return probe
        if probe is not None:
            probe[1].close()
        return self.children.start_probe(self.open_log)

    # --- openings ----------------------------------------------------------------------------------------

    def require_answers(self, user: int) -> None:
        """Raise OperatorError if too many openers of a user hang: another one would probably hang, too."""
        self.children.bury()
        now_s = time.monotonic()
        left = [(child, since_s) for child, since_s in self._ended.pop(user, ()) if child.pidfd >= 0]
        if left:
            self._ended[user] = left
        stuck = sum(1 for _, since_s in left if now_s - since_s > AGAIN_S)
        if stuck >= (STUCK_MAX if user else STUCK_MAX_OF_ROOT):
            what = f"{stuck} processes that were to open files for uid {user} do not end"
            raise OperatorError(errno.EBUSY, f"{what}: their storage does not answer")

    def open(
        self,
        vm: "Vm",
        config: "VmConfig",
        user: int,
        on_opened: "Callable[[Opened], None]",
        on_failed: "Callable[[VmdError], None]",
        *,
        boots: bool,
        given: ClientFiles | None = None,
        patience_s: float = 0.0,
        names_holder: bool = True,
        others_have: bool = False,
        mends: bool = False,
        seed_fd: int = -1,
    ) -> None:
        """Open the disks and the disc of a VM, and its boot files if it `boots`.

        Each file is opened with the rights of the user who has named it.

        `given`: files that a client has opened.  `patience_s`: how long to wait for locks that are being released.
        `others_have`: disks that are in use are only examined.  `mends`: a disk is accepted although a change of its
        snapshots was interrupted, which prevents a start.  `seed_fd`: an empty memory file of the VM for a new seed.
        """
        jobs = jobs_of(config, boots=boots, given=given, patience_s=patience_s, seeds=seed_fd >= 0)
        if others_have or mends:
            jobs = [job.replace(others_have=others_have, mends=mends) for job in jobs]
        opening = Opening(
            vm, user, jobs, given, on_opened, on_failed, names_holder=names_holder, key=vm, seed_fd=seed_fd
        )
        opening.boot_max = min(config.memory_bytes, BOOT_FILE_MAX)
        self._add(opening)

    def open_for(
        self,
        change: object,
        vm: "Vm",
        user: int,
        job: OpenFiles,
        on_opened: "Callable[[Opened], None]",
        on_failed: "Callable[[VmdError], None]",
    ) -> None:
        """Do one job for a change of a VM.  The files of the VM itself are not affected."""
        self._add(Opening(vm, user, [job], None, on_opened, on_failed, names_holder=True, key=change))

    def _add(self, opening: Opening) -> None:
        self.give_up(opening.key)
        self.by_key[opening.key] = opening
        self.waiting.append(opening)
        self.loop.call_later(0, self._begin)

    def _begin(self) -> None:
        """Begin the openings whose turn it is: one for each user, and AT_A_TIME at most; those of root do not wait."""
        at_work = {opening.user for opening in self.by_key.values() if opening not in self.waiting} - {0}
        for opening in list(self.waiting):
            if not opening.user or (opening.user not in at_work and len(at_work) < AT_A_TIME):
                at_work.add(opening.user)
                at_work.discard(0)
                self.waiting.remove(opening)
                self._begin_one(opening)

    def _begin_one(self, opening: Opening) -> None:
        opening.began_s = time.monotonic()
        try:
            self.require_answers(opening.user)
            for job in opening.jobs:
                self._begin_job(opening, job)
        except VmdError as error:
            self._fail(opening, error)
        except OSError as error:
            self._fail(opening, HostError("pass on memory for a boot file", error))
        except ValueError as error:  # too long for one message
            self._fail(opening, OperatorError(errno.E2BIG, f"configuration too long: {error}"))
        except Exception:  # an error of ours: the VM must not wait for ever
            self._fail(opening, OperatorError(errno.EIO, OUR_FAULT))
            raise
        else:
            self._go_on(opening)

    def _begin_job(self, opening: Opening, job: OpenFiles) -> None:
        """Give a job to an opener.  Raises HostError, OSError."""
        opener, self.reserve = self.reserve or self._new(), None
        opener.user = opening.user
        self.loop.call_later(AGAIN_S, self._fill_reserve)  # earlier if this opener ends first
        opener.opening, opener.vm = opening, opening.vm
        opening.openers.append(opener)
        fds: dict[str, list[int]] = {}
        try:
            if (job.disks or job.cdrom) and not job.only_writable:
                child, probe = self._take_probe()
                opener.helpers.append(child)
                fds["probe"] = [probe.detach()]
            if job.resize_bytes:
                child, resizer = self.children.start_probe(self.open_log, entry=IMGRESIZE_ENTRY, title="imgresize")
                opener.helpers.append(child)
                fds["resizer"] = [resizer.detach()]
            if job.kernel_at is not None or job.initrd_at is not None:
                fds["reader"] = [self._start_reader(opener)]
                for name, file in (("kernel", job.kernel_at), ("initrd", job.initrd_at)):
                    if file is not None:
                        fds[f"{name}_memory"] = [bounded_file(name, opening.boot_max)]
            if job.looks:
                fds["reader"] = [self._start_reader(opener)]
            if job.given:
                assert opening.given is not None
                fds["client"] = [self.core.clients.courier(opening.given.client)]
                for name, fd in opening.given.copies.items():
                    fds[f"{name}_copy"] = [os.dup(fd)]
            if job.seed is not None:
                child, seeder = self.children.start_probe(self.open_log, entry=SEEDER_ENTRY, title="seeder")
                opener.helpers.append(child)
                fds["seeder"], fds["seed_parts"] = [seeder.detach()], [memory_file("seed-parts")]
                fds["seed_made"] = [os.dup(opening.seed_fd)]
            ours, theirs = courier.pair()
            opening.opened.couriers.append(ours.detach())
            fds["courier"] = [theirs.detach()]
        except BaseException:
            close_all(fd for each in fds.values() for fd in each)
            raise
        self._watch(opener, ANSWER_S + job.patience_s)
        opener.channel.label = f"opener/{job.name}"
        opener.channel.send(job, fds=fds)

    def _start_reader(self, opener: Opener) -> int:
        """Start an imgboot for an opener; return the descriptor of its socket.  Raises HostError."""
        child, reader = self.children.start_probe(self.open_log, entry=IMGBOOT_ENTRY, title="imgboot")
        opener.helpers.append(child)
        return reader.detach()

    def _watch(self, opener: Opener, seconds: float) -> None:
        """Give up an opener if it sends nothing for so long."""
        if opener.deadline is not None:
            opener.deadline.cancel()
        opener.deadline = self.loop.call_later(seconds, lambda: self._give_up_on(opener))

    def _give_up_on(self, opener: Opener) -> None:
        """An opener does not answer, or the VM does not fetch its files."""
        opening = opener.opening
        self._end(opener)
        if opening is not None:
            self._fail(opening, OperatorError(errno.ETIMEDOUT, f"{opener.at}: does not answer"))

    def _end(self, opener: Opener) -> None:
        """Kill an opener and forget it.  If it hangs on dead storage it stays a process."""
        if self._all.pop(opener.channel, None) is None:
            return
        opener.channel.close()
        self._ended.setdefault(opener.user, []).append((opener.child, time.monotonic()))
        if opener.deadline is not None:
            opener.deadline.cancel()
        for child in (opener.child, *opener.helpers):
            child.kill()
        for delay_s in (SOON_S, AGAIN_S):
            self.loop.call_later(delay_s, self.children.bury)
        self.loop.call_later(AGAIN_S if opener is self.reserve else RESERVE_DELAY_S, self._fill_reserve)

    def _over(self, opening: Opening) -> None:
        """An opening is over: the next one may begin."""
        if self.by_key.get(opening.key) is opening:
            del self.by_key[opening.key]
        if opening in self.waiting:
            self.waiting.remove(opening)
        self.loop.call_later(0, self._begin)

    def _drop(self, opening: Opening) -> None:
        """End an opening, with its openers and couriers."""
        self._over(opening)
        for opener in opening.openers:
            self._end(opener)
        opening.opened.close()

    def _fail(self, opening: Opening, error: VmdError) -> None:
        """End an opening with an error."""
        if self.by_key.get(opening.key) is opening:
            self._drop(opening)
            opening.on_failed(error)

    def give_up(self, key: object) -> bool:
        """Cancel the opening for a VM or a change, if there is one; return whether there was one."""
        opening = self.by_key.get(key)
        if opening is not None:
            self._drop(opening)
        return opening is not None

    def vm_ended(self, vm: "Vm") -> None:
        """End the openers that still hold files for a VM that has ended.  One that hangs would keep their locks."""
        for opener in list(self._all.values()):
            if opener.vm is vm and opener.opening is None:
                self._end(opener)

    def close(self) -> None:
        """End all openers, because the daemon ends."""
        for opener in list(self._all.values()):
            self._end(opener)
        if self.probe is not None:
            self.probe[0].kill()

    # --- messages ----------------------------------------------------------------------------------------

    def on_at(self, message: OpenerAt, channel: "Channel") -> None:
        """An opener has begun with its next file: it has ANSWER_S more."""
        opener = self._of(channel)
        assert opener.opening is not None
        opener.at = message.what
        left_s = opener.opening.began_s + LONGEST_S - time.monotonic()
        self._watch(opener, min(left_s, ANSWER_S + max(job.patience_s for job in opener.opening.jobs)))

    def on_opened(self, message: FilesOpened, channel: "Channel") -> None:
        """An opener has opened everything."""
        opener = self._of(channel)
        opening, opener.opening = opener.opening, None
        assert opening is not None
        opening.openers.remove(opener)
        self._watch(opener, HAND_OVER_S)
        opened = opening.opened
        opened.disks += message.disks
        opened.files |= {each.what: each.file.key for each in message.files}
        opened.notes += message.notes
        opened.in_use += message.in_use
        opened.unused += message.unused
        opened.boot_name = opened.boot_name or message.boot_name
        opened.boot_options = opened.boot_options or message.boot_options
        self._go_on(opening)

    def _go_on(self, opening: Opening) -> None:
        """Report the result if all openers have answered."""
        if opening.openers:
            return
        self._over(opening)
        try:
            opening.on_opened(opening.opened)
        except Exception:  # as in `_begin_one`
            opening.opened.close()
            opening.on_failed(OperatorError(errno.EIO, OUR_FAULT))
            raise

    def on_not_opened(self, message: NotOpened, channel: "Channel") -> None:
        """An opener has failed, so the opening fails.

        If the reason is a lock, the error names its holder: a VM of this host, or another program.
        """
        opening = self._of(channel).opening
        assert opening is not None
        if message.no_code and not opening.looks:
            self._look(opening)
            return
        error = OperatorError(message.code, message.text)
        if message.file is not None:
            by, doing, marks = message.by, message.doing, message.marks
            in_use = InUse(message.what, message.file, by=by, doing=doing, marks=marks)
            if opening.names_holder:
                self._find_holder(opening, in_use)
                return
            error = in_use
        self._fail(opening, error)

    def _look(self, opening: Opening) -> None:
        """The disks are not bootable by a BIOS: find out what is on them, for the error.

        That takes an imgboot, which is started only in this case.  A start that succeeds does not wait for one.
        """
        opening.looks = True
        for opener in opening.openers:
            self._end(opener)
        opening.openers.clear()
        opening.opened.close()
        jobs = [job for job in opening.jobs if job.needs_code]
        opening.jobs = [job.replace(looks=True, cdrom="", given=(), seed=None, patience_s=LET_GO_S) for job in jobs]
        self._begin_one(opening)

    def _find_holder(self, opening: Opening, in_use: InUse) -> None:
        """Find the holder of a lock, then let the opening fail.  The error names the holder if it was found."""
        for opener in opening.openers:
            self._end(opener)
        opening.openers.clear()

        def fail(holder: "Holder | None") -> None:
            error = in_use
            if holder is None or self.children.are_ours(Caller(uid=holder.uid, gid=holder.uid, pid=holder.pid)):
                # The error for a change may name the VM itself.
                error = self.core.vms.holder(in_use, opening.vm if opening.key is opening.vm else None)
            if error is in_use and holder is not None:
                error = in_use.held_by(in_words(holder, opening.user))
            self._fail(opening, error)

        self.holders.ask(in_use.file, in_use.marks, fail)

    def _of(self, channel: "Channel") -> Opener:
        """Return the opener of a channel.  Raises PeerError if it has no job."""
        opener = self._all.get(channel)
        if opener is None or opener.opening is None:
            raise PeerError(channel.label, "answered a request that was not made")
        return opener

    def _on_lost(self, channel: "Channel", error: PeerError | None) -> None:
        """An opener has ended.  Each one ends after its job."""
        opener = self._all[channel]
        opening = opener.opening
        self._end(opener)
        if opener is self.reserve:
            self.reserve = None
        elif opening is not None:
            log.error(str(error) if error else f"lost {channel.label}")
            self._fail(opening, HostError(f"{opener.at}: its opener has ended", errno.EIO))

    def vm_of(self, channel: "Channel") -> int:
        """Return the id of the VM that an opener works for; 0 if there is none."""
        opener = self._all.get(channel)
        return opener.opening.vm.vmid if opener is not None and opener.opening is not None else 0


def jobs_of(
    config: "VmConfig", *, boots: bool, given: ClientFiles | None, patience_s: float, seeds: bool = False
) -> list[OpenFiles]:
    """Return one job for each user who has named files of a VM; a job is done with that user's rights."""
    jobs: dict[Owner | None, OpenFiles] = {}

    def job(user: Owner | None) -> OpenFiles:
        """Return the job of a user so far, or a new one."""
        return jobs.get(user) or OpenFiles(
            **identity(user),
            name=config.name,
            kernel=config.kernel,
            initrd=config.initrd,
            in_conf=bool(config.origin),
            patience_s=patience_s,
        )

    rights = config.rights
    kernel, initrd = rules.files_on_disks(config)
    gives = given is not None and "initrd" in given.names
    if boots and kernel is None:
        user = rights.boot if config.kernel else None
        jobs[user] = job(user).replace(boots=True, initrd="" if gives else config.initrd)
    if config.disks:
        jobs[rights.disks] = job(rights.disks).replace(disks=config.disks)
    if boots and kernel is not None:
        jobs[rights.disks] = jobs[rights.disks].replace(kernel_at=kernel, initrd_at=None if gives else initrd)
    if boots and firmware_needs_disk(config):
        jobs[rights.disks] = jobs[rights.disks].replace(needs_code=True)
    if config.cdrom:
        jobs[rights.cdrom] = job(rights.cdrom).replace(cdrom=config.cdrom)
    if given is not None:
        user = given.user if given.user.uid else None
        jobs[user] = job(user).replace(given=given.names, check_given=given.check_mode, copy_max=given.copy_max)
    if seeds:
        assert config.seed is not None
        if given is None or "seed" not in given.names:
            user = rights.seed
        wanted = job(user)
        jobs[user] = wanted.replace(
            seed=config.seed.replace(hostname=config.seed.hostname or hostname_of(config.name)),
            lladdrs=tuple(nic.lladdr for nic in config.nics),
            copy_max=max(wanted.copy_max, PARTS_MAX),
        )
    return list(jobs.values())


def firmware_needs_disk(config: "VmConfig") -> bool:
    """Return whether a VM is started by firmware that can boot from its disks only."""
    disc = bool(config.cdrom) or config.drive
    only_disks = config.boot_device is BootDevice.DISK or (not disc and config.boot_device is not BootDevice.CDROM)
    return not config.kernel and bool(config.disks) and only_disks


def identity(user: Owner | None) -> "dict[str, Any]":
    """Return the ids of a user, or of root, as fields of OpenFiles."""
    if user is None or not user.uid:
        return {"uid": 0, "gid": 0, "groups": ()}
    gid = user.gid if user.gid is not None else NOGROUP
    return {"uid": user.uid, "gid": gid, "groups": tuple(groups_of(user.uid, gid))}
