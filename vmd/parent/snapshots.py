"""Snapshots of VMs' disks: the steps of each request, and which process gets which file.

The parent does not look at the disks.  Each request has an imgwriter of its own.  The imgwriter gets the files over a
courier, prepares all disks, and changes them when the parent says so.  The steps for a VM that does not run:

    SnapshotRequest     from the client; the VM cannot be started meanwhile
    FilesOpened         an opener has locked the disks, as for a start: an imgwriter is started and gets them
    SnapshotsReady      all disks are prepared: the imgwriter is told to change them
    SnapshotsChanged    the client is answered when the imgwriter has ended, because that releases the disks

A VM that runs has its disks itself.  It is paused, and lends them to the imgwriter:

    LendDisks           the VM gives the disks to the imgwriter; for a new snapshot it also writes the machine to it
    DisksLent           the VM has given everything: together with SnapshotsReady the change is made, as above
    TakeDisksBack       sent when the imgwriter has ended, after success or failure: the VM continues
    DisksBack           the client is answered

A running VM goes back to a snapshot in another way.  When the disks are changed, its process is ended.  A new process
reads the machine from the imgwriter, which takes it from the first disk, in the same way as a VM is received.  A user
may have written that stream.  So the configuration in it is not used, and it cannot make the VM open a file.
"""

import errno
import os
import time

from vmd.closing import close, close_all
from vmd.errors import HostError, OperatorError, PeerError, VmdError, number, sentence
from vmd.images.names import check_name
from vmd.ipc import courier
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, SnapshotRequest, SnapshotsDone
from vmd.ipc.messages.imgwriter import (
    ChangeSnapshots,
    FinishSnapshots,
    SnapshotsChanged,
    SnapshotsFailed,
    SnapshotsReady,
)
from vmd.ipc.messages.shared import SNAPSHOT_DONE, SnapshotAction, SnapshotInfo, brief
from vmd.ipc.messages.vm import CancelTransfer, DisksBack, DisksLent, LendDisks, TakeDisksBack
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.clients import For
from vmd.parent.vm import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.shared import DiskImages
    from vmd.parent.children import Children
    from vmd.parent.connections import Attach
    from vmd.parent.core import Core
    from vmd.parent.life import Life
    from vmd.parent.opening import Opened, Openings
    from vmd.parent.transfers import Transfers
    from vmd.parent.vm import Vm
    from vmd.privsep.spawn import Child
    from vmd.record import Record

SILENT_S = 120.0  # for the next message of an imgwriter
END_LOOK_S = 0.1  # between two checks whether an imgwriter has ended
AT_A_TIME = 8  # requests
BUSY = "its snapshots are in use by another command"


class Job:
    """A request of a client, from its arrival to its answer, with its imgwriter."""

    def __init__(self, vm: "Vm", message: SnapshotRequest, user: int) -> None:
        self.vm = vm
        self.action = message.action
        self.tag = message.tag
        self.user = user
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.deadline: Timer | None = None
        self.failure: VmdError | None = None
        self.answered = False  # the imgwriter has sent its result, and ends
        self.writer_ended = False  # the imgwriter has ended
        self.ready = False  # the imgwriter has prepared all disks
        self.runs = vm.alive  # the VM runs, and lends its disks
        self.lend: tuple[LendDisks, dict[str, list[int]]] | None = None  # for the VM, until it is sent
        self.lent = not self.runs  # the VM has given everything
        self.vm_ended = False  # the VM has ended meanwhile
        self.state = -1  # a courier by which a new VM process gets the machine of the snapshot
        self.committed = False  # the imgwriter was told to make the change
        self.revived = False  # the VM's process is ended, and a new one gets the machine of the snapshot


class Snapshots:
    """The room of snapshots."""

    def __init__(self, core: "Core", openings: "Openings", attach: "Attach") -> None:
        self.core = core
        self.loop = core.loop
        self.clients = core.clients
        self.openings = openings
        self.attach = attach
        self.jobs: dict[Channel, Job] = {}  # by channel of the imgwriter, as long as that is open
        self.at_work: list[Job] = []  # jobs that are not answered yet
        self.life: Life
        self.transfers: Transfers
        self.children: Children
        self.open_log: Callable[[str], socket.socket]

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Get what starts processes; `open_log` makes the socket for the log lines of a process."""
        self.children, self.open_log = children, open_log

    def close(self) -> None:
        """Kill all imgwriters, because the daemon ends.  A change that is only prepared leaves the disks unchanged."""
        for job in self.jobs.values():
            if job.child is not None:
                job.child.kill()

    # --- a request -------------------------------------------------------------------------------------

    def serve(self, message: SnapshotRequest, caller: Caller, envelope: Envelope) -> None:
        """List, make, delete or go back to snapshots of a VM."""
        if self.core.ending:
            raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
        vm = self.core.vms.get(message.vmid, message.name)
        vm.require_control(caller, "use the snapshots of")
        listing = message.action is SnapshotAction.LIST
        if message.action is SnapshotAction.CREATE:
            try:
                check_name(message.tag)
            except ValueError as error:
                raise OperatorError(errno.EINVAL, str(error)) from None
        elif listing == bool(message.tag):
            raise OperatorError(errno.EINVAL, "a list takes no tag; every other action needs one")
        if vm.alive:
            vm.require_sendable()
        vm.require_unchanging()
        if not (vm.disks if vm.alive else vm.config.disks):
            raise OperatorError(errno.EINVAL, f"vm {vm.name} has no disks")
        for disk in vm.disks if vm.alive else ():  # refused here, so that the VM is not paused for it
            if disk.images[0].format != "qcow2":
                what = f"is {disk.images[0].format}: only qcow2 images have snapshots"
                raise OperatorError(errno.EINVAL, f"vm {vm.name}: disk {disk.images[0].path}: {what}")
        if any(job.vm is vm for job in self.at_work):
            raise OperatorError(errno.EBUSY, f"vm {vm.name}: {BUSY}")
        if len(self.at_work) >= AT_A_TIME:
            raise OperatorError(errno.EBUSY, f"snapshots of {len(self.at_work)} VMs are being changed already")
        job = Job(vm, message, caller.uid)
        if job.runs:
            self._borrow(job)
            self.at_work.append(job)
            self.clients.wait(envelope.peerid, For.IMAGES, vm.vmid)
            return
        self.openings.require_answers(caller.uid)
        vm.begin_disk_work(BUSY)
        self.at_work.append(job)
        self.clients.wait(envelope.peerid, For.IMAGES, vm.vmid)
        self.openings.open(
            vm,
            vm.config.replace(cdrom=""),
            caller.uid,
            lambda opened: self._opened(job, opened),
            lambda error: self._fail(job, error),
            boots=False,
            patience_s=vm.patience_s(),
            mends=True,
        )

    def _borrow(self, job: Job) -> None:
        """Begin a job for a running VM, which will lend its disks.  Raises VmdError; the VM is unchanged then."""
        vm, look = job.vm, job.action is SnapshotAction.LIST
        ours: dict[str, list[int]] = {}
        theirs: dict[str, list[int]] = {}
        try:
            asks, gives = courier.pair()
            ours["couriers"], theirs["courier"] = [asks.detach()], [gives.detach()]
            if job.action is SnapshotAction.CREATE:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                ours["stream"], theirs["stream"] = [reader], [writer]
            if job.action is SnapshotAction.GO_BACK:
                asks, gives = courier.pair()
                job.state, ours["state"] = asks.detach(), [gives.detach()]
        except OSError as error:
            close_all(fd for fds in (*ours.values(), *theirs.values()) for fd in fds)
            raise HostError("make a courier", error) from error
        try:
            self._begin(job, vm.disks, ours)
        except BaseException:
            close_all(fd for fds in theirs.values() for fd in fds)
            if job.state >= 0:
                close(job.state)
            raise
        if not look:
            vm.begin_send(keep=True, state=State.SAVING)
            vm.disk_work = BUSY
        job.lend = LendDisks(vmid=vm.vmid, one_shot=bool(vm.once_because), look=look), theirs

    def _opened(self, job: Job, opened: "Opened") -> None:
        """The disks of a stopped VM are open and locked: give them to an imgwriter."""
        try:
            self._begin(job, opened.disks, {"couriers": opened.take_couriers()})
        except VmdError as error:
            self._fail(job, error)

    def _begin(self, job: Job, disks: "tuple[DiskImages, ...]", fds: dict[str, list[int]]) -> None:
        """Start an imgwriter and send it the job.  Owns the descriptors.  Raises VmdError."""
        try:
            job.child, ours = self.children.start(Proc.IMGWRITER, self.open_log)
        except BaseException:
            close_all(fd for each in fds.values() for fd in each)
            raise
        channel = job.channel = self.attach(
            ours, Proc.IMGWRITER, f"imgwriter/{job.vm.name}", on_lost=self._on_lost
        )
        self.jobs[channel] = job
        self._watch(job)
        now_ns = time.time_ns()
        message = ChangeSnapshots(
            name=job.vm.name,
            action=job.action,
            tag=job.tag,
            disks=disks,
            date_ns=now_ns,
            clock_ns=max(0, now_ns - int(job.vm.started_s * 1e9)) if job.runs else 0,
        )
        try:
            channel.send(message, fds=fds)
        except ValueError as error:  # too long for one message
            failure = OperatorError(errno.E2BIG, f"configuration too long: {error}")
            self.loop.call_later(0, lambda: self._lose(job, failure))  # when the caller has registered the job

    # --- messages --------------------------------------------------------------------------------------

    def on_message(self, message: "Record", channel: "Channel") -> None:
        """Handle a message of an imgwriter."""
        match message:
            case SnapshotInfo():
                self.on_info(message, channel)
            case SnapshotsReady():
                self.on_ready(channel)
            case SnapshotsChanged():
                job = self._of(channel)
                job.answered = True  # the client is answered when it has ended
                if job.committed and job.runs and job.action is SnapshotAction.GO_BACK:
                    self._revive(job)
            case SnapshotsFailed():
                job = self._of(channel)
                job.answered = True
                job.failure = OperatorError(message.code, message.text)  # an error of the VM is only a consequence
            case _:
                job = self._of(channel, answered=True)  # it may still be giving the machine to a new process
                self._watch(job)
                if job.lend is not None:  # the VM is paused only now that the imgwriter works
                    (lend, fds), job.lend = job.lend, None
                    self.core.peers.send(Proc.VMM, lend, fds=fds)

    def on_info(self, message: SnapshotInfo, channel: "Channel") -> None:
        """Pass a row of a list on to the client."""
        job = self._of(channel)
        if job.action is not SnapshotAction.LIST:
            raise PeerError(channel.label, "sent a list that was not requested")
        self._watch(job)
        for wait in self.clients.waiting(For.IMAGES, job.vm.vmid):
            self.clients.answer(wait.client, message)

    def on_ready(self, channel: "Channel") -> None:
        """All disks are prepared."""
        job = self._of(channel)
        self._watch(job)
        job.ready = True
        self._finish(job)

    def _finish(self, job: Job) -> None:
        """Tell the imgwriter to make the change, once it is ready and the VM has lent its disks.

        If the job has failed meanwhile, the imgwriter is told to leave the disks unchanged.
        """
        if job.channel in self.jobs and job.ready and job.lent:
            assert job.channel is not None
            first_last = job.action is SnapshotAction.CREATE
            job.committed = job.failure is None
            if job.committed and job.action is SnapshotAction.GO_BACK:
                job.vm.going_back = True
                self.core.write()  # first, so that a next parent does not continue the guest on changed disks
            job.channel.send(FinishSnapshots(commit=job.failure is None, first_last=first_last))

    def on_lent(self, message: DisksLent, _envelope: Envelope) -> None:
        """A VM has lent its disks, or has failed to."""
        vm = self.core.vms.living(message.vmid)
        job = next((job for job in self.at_work if job.vm is vm), None)
        if job is None:
            if vm.state is State.SAVING:  # an earlier parent has begun this
                self.core.peers.send(Proc.VMM, TakeDisksBack(vmid=vm.vmid))
            return
        if job.lent:
            raise PeerError("vmm", f"vm {vm.name} lent its disks without a request")
        job.lent = True
        if message.text and job.failure is None:
            job.failure = OperatorError(errno.EIO, message.text)
        if job.writer_ended:
            self._give_back(job)
        else:
            self._finish(job)

    def on_back(self, message: DisksBack, _envelope: Envelope) -> None:
        """A VM has its disks back, and continues."""
        vm = self.core.vms.living(message.vmid)
        if vm.state is State.SAVING and not any(job.vm is vm for job in self.at_work):
            vm.stay()  # an earlier parent has begun this
            log.warn(f"vm {vm.name}: continues without the new snapshot: {message.text or 'interrupted'}")
        for job in [job for job in self.at_work if job.vm is vm and job.writer_ended]:
            if message.text and job.failure is None:
                job.failure = OperatorError(errno.EIO, message.text)
            self._answer(job)

    def on_gone(self, vm: "Vm") -> None:
        """A VM process has ended.  Its job fails, unless the imgwriter was already told to make the change."""
        for job in [job for job in self.at_work if job.vm is vm and job.runs]:
            job.vm_ended = True
            if job.revived:
                job.failure = job.failure or OperatorError(
                    vm.code, f"its disks are the snapshot's, but it did not continue: {vm.text or 'it has ended'}"
                )
                self._answer(job)
            elif job.writer_ended:
                self._answer(job)
            elif not (job.ready and job.lent):
                self._lose(job, OperatorError(errno.ECANCELED, "has ended meanwhile"))

    def on_client_gone(self, vmid: int) -> None:
        """The client of a job has disconnected: cancel it, if the VM is still lending its disks."""
        for job in self.at_work:
            if job.vm.vmid == vmid and job.runs and not job.lent:
                self.core.peers.send(Proc.VMM, CancelTransfer(vmid=vmid))

    def _revive(self, job: Job) -> None:
        """The disks are in the state of the snapshot: replace the VM's process, whose machine does not fit them."""
        vm, stream = job.vm, job.state
        job.state = -1
        if job.vm_ended:  # it stays stopped
            close(stream)
            return
        job.revived = True
        paused = vm.sending is not None and vm.sending.state is State.PAUSED

        def revive() -> None:
            vm.end_disk_work()
            try:
                self.transfers.begin_revival(vm, stream, paused=paused)
            except VmdError as error:
                job.failure = error
                self.life.network.release(vm.vmid)
                self.life.vm_ended(vm, brief(sentence(error)))

        vm.revive = revive
        self.life.kill(vm)

    def on_received(self, vm: "Vm") -> None:
        """A VM runs with the machine of its snapshot."""
        for job in [job for job in self.at_work if job.vm is vm and job.revived]:
            self._answer(job)

    def vm_of(self, channel: "Channel") -> int:
        """Return the id of the VM that an imgwriter works for; 0 if there is none."""
        job = self.jobs.get(channel)
        return job.vm.vmid if job is not None else 0

    def _of(self, channel: "Channel", *, answered: bool = False) -> Job:
        """Return the job of an imgwriter.  Raises PeerError if there is none.

        Without `answered` it also raises if the imgwriter has sent its result already.
        """
        job = self.jobs.get(channel)
        if job is None or (job.answered and not answered):
            raise PeerError(channel.label, "answered a request that was not made")
        return job

    # --- the end ---------------------------------------------------------------------------------------

    def _watch(self, job: Job) -> None:
        """Give up an imgwriter if it sends nothing for SILENT_S."""
        if job.deadline is not None:
            job.deadline.cancel()
        what = f"vm {job.vm.name}: its disks do not answer"
        job.deadline = self.loop.call_later(
            SILENT_S, lambda: self._lose(job, OperatorError(errno.ETIMEDOUT, what))
        )

    def _on_lost(self, channel: "Channel", error: PeerError | None) -> None:
        """An imgwriter has ended.  Each one ends after its job."""
        job = self.jobs.get(channel)
        if job is not None:
            if error is not None:
                log.error(str(error))
            self._lose(job, HostError(f"vm {job.vm.name}: imgwriter has ended", errno.EIO))

    def _lose(self, job: Job, error: VmdError) -> None:
        """Kill an imgwriter and wait for its end.  If it has sent no result, the job fails with this error."""
        if job.channel is None or self.jobs.pop(job.channel, None) is None:
            return
        job.channel.close()
        if job.deadline is not None:
            job.deadline.cancel()
        if not job.answered and job.failure is None:
            job.failure = error
        assert job.child is not None
        job.child.kill()
        self._await_end(job)

    def _await_end(self, job: Job) -> None:
        """Go on when the process has ended: until then it has the disks, and could write to them."""
        assert job.child is not None
        self.children.bury()
        if job.child.pidfd >= 0:
            self.loop.call_later(END_LOOK_S, lambda: self._await_end(job))
        else:
            job.writer_ended = True
            if job.lend is not None:
                self._answer(job)  # the VM was not asked to lend its disks
                return
            if job.revived:
                return  # the client is answered when the VM runs again, or has failed to
            if job.runs and job.lent and not job.vm_ended:
                self._give_back(job)
            elif not job.runs or job.vm_ended:
                self._answer(job)

    def _give_back(self, job: Job) -> None:
        """Let a VM take its disks back, or kill it if its disks may have changed."""
        if job.action is SnapshotAction.LIST:
            self._answer(job)
        elif job.committed and job.action is SnapshotAction.GO_BACK:
            self.life.kill(job.vm)  # some of its disks may be changed already, unlike what its guest knows
        else:
            self.core.peers.send(Proc.VMM, TakeDisksBack(vmid=job.vm.vmid))

    def _answer(self, job: Job) -> None:
        """End a job: release the VM, and answer the client."""
        if job not in self.at_work:
            return
        self.at_work.remove(job)
        vm = job.vm
        if job.state >= 0:
            close(job.state)
        if job.lend is not None:
            close_all(fd for fds in job.lend[1].values() for fd in fds)
        vm.end_disk_work()
        if job.runs and not job.vm_ended:
            vm.stay()
        if job.failure is None:
            if job.action in SNAPSHOT_DONE:
                log.info(f"{vm.name}: {SNAPSHOT_DONE[job.action]} {job.tag}")
                self.core.events.add("snapshot", vm, text=SNAPSHOT_DONE[job.action], value=job.tag)
            self.clients.answer_all(For.IMAGES, vm.vmid, SnapshotsDone(vmid=vm.vmid, name=vm.name, tag=job.tag))
            return
        text = brief(sentence(job.failure))
        where = "" if text.startswith(f"vm {vm.name}: ") else f"vm {vm.name}: "
        log.error(f"{where}{text}")
        self.clients.fail_all(For.IMAGES, vm.vmid, number(job.failure), f"{where}{text}")

    def _fail(self, job: Job, error: VmdError) -> None:
        """The disks could not be opened: end the job with the error."""
        job.failure = error
        self._answer(job)
