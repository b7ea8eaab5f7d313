"""The lives of VMs: how a VM starts, runs, stops and ends.  VMs of vm.conf are started a few at a time.

The life of a VM that is received begins in `transfers`.  It continues here once its guest runs.
"""

import errno
import os
import time

from vmd.closing import close_all
from vmd.config.model import Owner
from vmd.errors import VMD_IN_DOUBT, VMD_PARENT_INVALID, HostError, OperatorError, VmdError, number
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.messages.clients import (
    Caller,
    Failed,
    Ok,
    StartRequest,
    StopAccepted,
    StopRequest,
    VmPaused,
    VmReceived,
    VmStarted,
    VmTerminated,
    WaitRequest,
)
from vmd.ipc.messages.priv import NicsFailed, NicsMade
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import Outcome, ReceivedHeader, ReceivedMachine, StartVm, StopMode, StopVm, VmFailed, VmRunning
from vmd.ipc.messages.vmm import VmExited
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import endings, instances, reload, service
from vmd.parent.access import may_control, not_allowed, require_root
from vmd.parent.bounds import Bounds
from vmd.parent.clients import For
from vmd.parent.limits import require_files, require_room
from vmd.parent.opening import ClientFiles, replaced
from vmd.parent.report import brief_notes
from vmd.parent.requests import checked_request, described, one_shot_config, require_startable
from vmd.parent.usage import host_pid
from vmd.parent.vm import State, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import VmConfig
    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Timer
    from vmd.parent.consoles import Consoles
    from vmd.parent.core import Core
    from vmd.parent.network import Network
    from vmd.parent.oom import OomScores
    from vmd.parent.opening import Opened, Openings
    from vmd.parent.status import Status
    from vmd.record import Record

STOP_GRACE_S = 120.0  # for guests to shut down when the daemon ends; `vmctl stop` gives them the same
# Each comes once in the life of a VM.  If the handler of one fails, nobody knows the VM's state.
SAID_ONCE = (VmRunning, VmFailed, ReceivedHeader, ReceivedMachine, NicsMade, NicsFailed)
# Bytes of a client's boot image that are copied for reboots.  It may also be as large as its guest's memory.
COPY_MAX, COPY_MAX_OF_ROOT = 1 << 28, 1 << 30
LAST_OUTPUT_S = 2.0  # for console viewers to read the output of the last guest


class Life:
    """The room of starts and ends."""

    def __init__(
        self, core: "Core", consoles: "Consoles", openings: "Openings", network: "Network", status: "Status"
    ) -> None:
        self.core = core
        self.vms = core.vms
        self.clients = core.clients
        self.consoles = consoles
        self.openings = openings
        self.network = network
        self.status = status
        self.batch_timer: Timer | None = None
        self.on_gone: Callable[[Vm], None] = lambda _vm: None  # a VM process has ended, or waits for an operator
        self.on_received: Callable[[Vm], None] = lambda _vm: None  # a received VM runs
        self.on_settled: Callable[[int], None] = lambda vmid: None  # the last process of a VM has ended
        self.scores: OomScores | None = None
        self.bounds = Bounds(core.peers)

    # --- starting ----------------------------------------------------------------------------------------

    def serve_start(self, message: StartRequest, caller: Caller, envelope: "Envelope") -> None:
        """Start a known VM, or register the VM that the client describes and start it."""
        if self.core.ending:
            raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
        names = message.files
        described = message.template or message.config is not None
        if described:
            vm = self._described(message, caller)
        else:
            vm = self.vms.get(message.vmid, message.name)
            if not may_control(caller, vm.config.owner.uid, vm.config.owner.gid):
                raise not_allowed(caller, f"start vm {vm.name}", vm.config.owner.uid, vm.config.owner.gid)
            vm.require_startable()
            if "seed" in names:
                what = "has the seed that vm.conf gives it: only a new VM or instance takes another one (-C)"
                raise OperatorError(errno.EEXIST, f"vm {vm.name} {what}")
        try:
            config = one_shot_config(vm.config, message)
            given = None
            if names:
                boots = tuple(name for name in names if name != "seed")
                if described:
                    vm.keep_files(boots)
                given = ClientFiles(
                    client=envelope.peerid,
                    user=Owner(uid=caller.uid, gid=caller.gid),
                    names=names,
                    check_mode=not described,
                    copies=dict(vm.kept),
                    copy_max=max(config.memory_bytes, COPY_MAX if caller.uid else COPY_MAX_OF_ROOT) if described else 0,
                )
            self.start(vm, uid=caller.uid, config=config, given=given)
        except Exception:
            if not vm.from_config:
                self.vms.remove(vm)
            raise
        vm.restarts.started_by_user()
        self.clients.wait(envelope.peerid, For.START, vm.vmid)
        if message.console:
            self.consoles.give(vm, caller, envelope.peerid)

    def _described(self, message: StartRequest, caller: Caller) -> Vm:
        """Register the VM that a client describes.  Raises OperatorError."""
        boot = "kernel" in message.files
        wanted = described(
            message, given_boot=boot, given_initrd="initrd" in message.files, given_seed="seed" in message.files
        )
        if message.template:
            wanted = self._instance(message.template, wanted, caller)
        else:
            require_root(caller, "start a VM that vm.conf does not describe")
            wanted = checked_request(wanted, bootable=boot)
        return self.vms.add(wanted, from_config=False)

    def _instance(self, name: str, wanted: "VmConfig", caller: Caller) -> "VmConfig":
        """Return the configuration of an instance: the client's values where given, the template's elsewhere.

        Raises OperatorError.
        """
        template = self.vms.template(name)
        if template is None:
            raise OperatorError(VMD_PARENT_INVALID, f"vm {wanted.name}: template {name} not found")
        if self.vms.find(0, wanted.name) is not None:
            raise OperatorError(errno.EEXIST, f"vm {wanted.name} already exists")
        config = instances.derive(template, wanted, caller)
        if caller.uid:
            instances.require_free(self.vms, wanted)
        return checked_request(config, bootable=bool(config.kernel)).replace(parent=template.name)

    def start(
        self,
        vm: Vm,
        *,
        uid: int,
        config: "VmConfig | None" = None,
        given: ClientFiles | None = None,
        again: bool = False,
    ) -> None:
        """Begin a start: open the VM's files, then have vmm start it.  `again`: its guest has reset itself.

        `config` differs from the VM's own for a one-shot boot.  Raises OperatorError or HostError; the VM is
        unchanged then.  A later failure is the answer to the clients that wait for the start.
        """
        config = config or vm.config
        once = vm.from_config and (config != vm.config or given is not None)
        kernel = "kernel" in (given.names if given is not None else vm.kept)
        require_startable(config, bootable=kernel or again)
        self.require_room(vm, config, again=again)
        self.openings.require_answers(uid)
        fresh_seed = config.seed is not None and not (again and "seed" in vm.kept)
        if fresh_seed:
            vm.new_seed()
        fresh_console = vm.open_console()
        try:
            assert vm.pty is not None
            vm.pty.give_to(uid, vm.config.owner.gid)
        except HostError:
            if fresh_console:
                vm.drop_pty()
            raise
        vm.begin_start(uid, again=again)
        vm.once_because = endings.ONCE.get(config.boot_device, endings.ONLY_THAT_START if once else "")
        self.openings.open(
            vm,
            config,
            uid,
            lambda opened: self._opened(vm, config, opened, again=again),
            lambda error: self.not_started(vm, error, again=again),
            boots=not kernel,
            given=given,
            patience_s=vm.patience_s(),
            seed_fd=vm.kept.get("seed", -1) if fresh_seed else -1,
        )

    def _opened(self, vm: Vm, config: "VmConfig", opened: "Opened", *, again: bool) -> None:
        """The VM's files are open: send it to vmm, together with its interfaces."""
        try:
            if not again:  # after a reset the notes of the first start still hold
                self.note(vm, config, [*opened.notes, *self.network.notes(config)])
            for what in replaced(vm.files, opened.files) if again else ():
                log.warn(f"vm {vm.name}: {what} is not the file that its guest had before it was reset")
            vm.files, vm.disks = opened.files, opened.disks
            message = StartVm(
                vmid=vm.vmid,
                config=config,
                boot_name=opened.boot_name or config.kernel or "boot image",
                boot_options=opened.boot_options,
                verbosity=self.core.verbosity,
                disks=opened.disks,
            )
            fds = {**vm.process_fds(), "couriers": opened.take_couriers()}
            self.network.launch(vm, message, fds, lambda code, text: self.start_failed(vm, code, text))
        except VmdError as error:
            opened.close()
            self.not_started(vm, error, again=again)

    def not_started(self, vm: Vm, error: VmdError, *, again: bool) -> None:
        """A start has failed: the VM ends.  The clients that wait for the start get the error as their answer."""
        self.network.release(vm.vmid)
        text = brief(str(error))
        if again:
            log.error(f"vm {vm.name}: cannot reboot: {text}")
            self.vm_ended(vm, f"cannot reboot: {text}")
            return
        vm.code = number(error)
        log.error(f"vm {vm.name}: {text.removeprefix(f'vm {vm.name}: ')}")
        self.vm_ended(vm, text.removeprefix(f"vm {vm.name}: "), failed=Failed(code=vm.code, text=text))

    def require_room(self, vm: Vm, config: "VmConfig", *, again: bool = False) -> None:
        """Raise OperatorError if the VM would exceed the limits of this host.

        A VM that starts `again` after a reset is counted already.  For it only the open files are checked.
        """
        require_files()
        if again:
            return
        others = (other.running_config or other.config for other in self.vms if other.alive and other is not vm)
        require_room(config, others, self.core.config.settings)

    def note(self, vm: Vm, config: "VmConfig", notes: list[str]) -> None:
        """Log the notes about a start, and keep them for the clients that wait for that start."""
        vm.notes = brief_notes(notes)
        where = f"{config.origin}: " if config.origin else ""
        for note in vm.notes:
            log.warn(f"{where}vm {vm.name}: {note}")

    def start_failed(self, vm: Vm, code: int, text: str) -> None:
        """A VM could not get its interfaces: it ends in the same way as if vmm had reported its end."""
        vm.code = code
        log.error(f"vm {vm.name}: {text}")
        self.vm_ended(vm, brief(text))

    def start_batch(self) -> None:
        """Start as many waiting VMs as one round allows, and set a timer for the rest (*cat. 2.9*)."""
        if not self.core.serving:
            return  # `Parent.serve` calls this again
        if self.batch_timer is not None:
            self.batch_timer.cancel()
            self.batch_timer = None
        settings = self.core.config.settings
        room = settings.start_parallel or os.cpu_count() or 1
        for vm in self.vms:
            if vm.state is not State.WAITING or self.core.ending:
                continue
            if room == 0:
                self.batch_timer = self.core.loop.call_later(settings.start_delay_s, self.start_batch)
                return
            room -= 1
            try:
                self.start(vm, uid=vm.config.owner.uid)
            except VmdError as error:
                vm.leave_queue(str(error).removeprefix(f"vm {vm.name}: "))
                log.error(f"vm {vm.name}: {vm.text}")

    def start_batch_in_time(self) -> None:
        """Start the VMs that wait, by the settings of a new configuration.

        Unlike vmd, a reload does not start a batch before its time, because a reload does not make the host less busy.
        """
        waited = self.batch_timer
        if waited is None or waited.callback is None:
            self.start_batch()
            return
        waited.cancel()
        left_s = min(self.core.config.settings.start_delay_s, max(0.0, waited.due_s - time.monotonic()))
        self.batch_timer = self.core.loop.call_later(left_s, self.start_batch)

    # --- running -----------------------------------------------------------------------------------------

    def on_running(self, message: VmRunning, envelope: "Envelope") -> None:
        """The guest executes.  The guest of a received VM continues, or stays paused if the client wants that."""
        vm = self.vms.living(message.vmid)
        assert vm.pty is not None
        process = envelope.take_fds("process")
        pid = host_pid(process[0]) if process else 0
        close_all(process)
        vm.take_figures(envelope.take_fd("figures"))
        if self.scores is not None:
            self.scores.give_usual(pid)
        self.consoles.on_change(vm)
        tty, paused = vm.pty.path, message.paused
        if vm.receiving is None:
            vm.begin_run(pid)
            vm.notes = brief_notes([*vm.notes, *self.bounds.begin(vm)])
            log.info(f"started {vm.name} (vm {vm.vmid}) successfully, tty {tty}")
            started = VmStarted(vmid=vm.vmid, name=vm.name, pid=pid, tty=tty, notes=vm.notes)
            self.clients.answer_all(For.START, vm.vmid, started)
            return
        vm.end_receive(pid, paused=paused)
        self.bounds.begin(vm)
        if vm.running_config is not None:
            self.vms.adopt(vm, vm.running_config, self.core.config.settings.local_prefix)
        log.info(f"received {vm.name} (vm {vm.vmid}) successfully, tty {tty}")
        received = VmReceived(vmid=vm.vmid, name=vm.name, pid=pid, tty=tty, paused=paused)
        self.on_received(vm)
        self.clients.answer_all(For.TRANSFER, vm.vmid, received)
        self.clients.answer_all(For.PAUSE, vm.vmid, VmPaused(vmid=vm.vmid, name=vm.name, paused=paused))

    # --- stopping ----------------------------------------------------------------------------------------

    def serve_stop(self, message: StopRequest, caller: Caller, envelope: "Envelope") -> None:
        """Ask the guest to shut down, or kill the VM."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "stop")
        if vm.state is State.WAITING:
            vm.leave_queue()
            text = "was waiting for its start"
            self.clients.answer(envelope.peerid, VmTerminated(vmid=vm.vmid, name=vm.name, text=text))
            return
        vm.begin_stop(force=message.force)
        if not message.wait:
            self.clients.answer(envelope.peerid, StopAccepted(vmid=vm.vmid, name=vm.name))
        elif not self.clients.waits(envelope.peerid, For.END, vm.vmid):
            self.clients.wait(envelope.peerid, For.END, vm.vmid)
        self.stop_process(vm, StopMode.KILL if message.force else StopMode.GRACEFUL)

    def serve_wait(self, message: WaitRequest, caller: Caller, envelope: "Envelope") -> None:
        """Answer when the VM has ended."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "wait for")
        if not vm.alive:
            raise OperatorError(errno.EINVAL, f"vm {vm.name} is not running")
        if self.clients.waits(envelope.peerid, For.END, vm.vmid):
            raise OperatorError(errno.EALREADY, f"vm {vm.name} is already waited for")
        self.clients.wait(envelope.peerid, For.END, vm.vmid)

    def stop_process(self, vm: Vm, mode: StopMode) -> None:
        """Stop a VM.  A VM that still waits for files or interfaces has no process yet; giving up the wait ends it."""
        waited = self.openings.give_up(vm) or self.network.give_up(vm)
        if waited and vm.receiving is None:
            self.network.release(vm.vmid)  # the interfaces from before a reset of the guest
            self.vm_ended(vm, "stopped before its guest began", endings.KILLED)
        else:
            self.core.peers.send(Proc.VMM, StopVm(vmid=vm.vmid, mode=mode))

    def kill(self, vm: Vm) -> None:
        """Stop a VM without asking its guest."""
        vm.begin_stop(force=True)
        self.stop_process(vm, StopMode.KILL)

    def stop_all(self) -> None:
        """Stop all VMs because the daemon ends.

        The first call asks the guests to shut down.  The second call, or the timer after 120 s, kills the VMs.
        """
        alive = [vm for vm in self.vms if vm.alive]
        mode = StopMode.KILL if self.core.ending else StopMode.GRACEFUL
        if alive and not self.core.ending:
            log.info(f"stopping {len(alive)} VMs, {STOP_GRACE_S:.0f} s at most")
            service.notify("STOPPING=1")
            self.core.loop.call_later(STOP_GRACE_S, self.stop_all)
        self.core.ending = True
        for vm in alive:
            vm.begin_stop(force=True)
            self.stop_process(vm, mode)
        self.end_after_last_vm()

    # --- ending ------------------------------------------------------------------------------------------

    def on_failed(self, message: VmFailed, _envelope: "Envelope") -> None:
        """The VM could not be built.  VmExited follows; its handler cleans up and answers the waiting clients."""
        vm = self.vms.living(message.vmid)
        vm.text, vm.code = brief(message.text), message.code
        if vm.receiving is not None:
            vm.receiving.unbuilt = True
        log.error(f"vm {vm.name}: {message.text}")

    def on_exited(self, message: VmExited, _envelope: "Envelope") -> None:
        """The VM process has ended: start the VM again after a guest reset, or else release what it held."""
        self.process_ended(message)

    def process_ended(self, message: VmExited) -> None:
        """A VM process has ended, now or while an earlier parent ran.  Raises PeerError."""
        vm = self.vms.living(message.vmid)
        self.openings.vm_ended(vm)
        lack, vm.memory_lack = vm.memory_lack, ""
        if vm.revive is not None:
            revive, vm.revive = vm.revive, None
            revive()
            return
        text = brief((vm.receiving.failure if vm.receiving else "") or message.text or vm.text)
        asked = vm.state is State.STOPPING
        how = endings.how_it_ended(message.outcome, asked=asked, sent=vm.sent is not None)
        if vm.receiving is not None and vm.receiving.failure:
            how = endings.FAILED
        elif lack and message.outcome in (Outcome.FAILED, Outcome.KILLED):
            limit = (vm.running_config or vm.config).limit
            text = endings.for_lack_of_memory(lack, limit.memory_bytes, text)
        elif how == endings.STOPPED and message.outcome is Outcome.REBOOT:
            text = endings.AS_ASKED
        elif how == endings.REBOOTED and vm.receiving is None:
            if vm.once_because:
                text = endings.not_again(vm.once_because)
            elif not vm.restarts.may_restart():
                text = "restarted too quickly"
                log.error(f"vm {vm.vmid} {text}")
            else:
                why = self._reboot(vm)
                if not why:
                    return
                how, text = endings.FAILED, why
        self.on_settled(vm.vmid)
        self.openings.give_up(vm)  # a VM that is received may still wait for its files or interfaces
        self.network.give_up(vm)
        self.network.release(vm.vmid)
        self.vm_ended(vm, text, how)

    def _reboot(self, vm: Vm) -> str:
        """Start a VM whose guest has reset itself; return why it cannot be started, or ""."""
        uid = vm.uid
        vm.begin_reboot()
        log.info(f"{vm.name}: rebooting (vm {vm.vmid})")
        try:
            self.start(vm, uid=uid, config=vm.running_config, again=True)
        except VmdError as error:
            log.error(f"vm {vm.name}: cannot reboot: {error}")
            return f"cannot reboot: {error}"
        vm.once_because = ""
        vm.guest_resets += 1
        self.status.answer_devices(vm.vmid)
        self._answer_overtaken(vm, errno.EAGAIN, "was reset by its guest meanwhile")
        return ""

    def vm_ended(self, vm: Vm, text: str, how: str = endings.FAILED, *, failed: Failed | None = None) -> None:
        """A VM has ended: release what it held, and answer the clients that wait.

        `failed` is the answer to those that wait for its start; without it they get `text`.
        """
        self.on_settled(vm.vmid)
        self.openings.vm_ended(vm)
        if failed is None:  # otherwise the caller has logged why it did not start
            log.info(f"{vm.name}: terminated vm {vm.vmid}{': ' + text if text else ''}")
        terminated = VmTerminated(vmid=vm.vmid, name=vm.name, text=text, how=how)
        self.clients.answer_all(For.END, vm.vmid, terminated)
        self.status.answer_devices(vm.vmid)
        self.consoles.on_ended(vm)
        vm.ended(text, how)
        vm.drop_files()  # the next life boots what the configuration names
        if not vm.from_config:
            self.vms.remove(vm)
        if vm.resetting:
            self._reset_done(vm)
        # Last, so that a client that tries again at once finds everything free.
        self._answer_overtaken(vm, vm.code, text or "has ended meanwhile")
        text = f"vm {vm.name}: {text or 'ended while it was starting'}"
        self.clients.answer_all(For.START, vm.vmid, failed or Failed(code=vm.code, text=text))
        self.end_after_last_vm()

    def give_up(self, vmid: int, message: "Record") -> None:
        """The handler of a message about a VM has failed: answer the clients that wait.

        The VM ends if the message was one that changes its state, because its state is unknown then.
        """
        vm = self.vms.find(vmid, "")
        if vm is None or not vm.alive:
            return
        unstarted = isinstance(message, NicsMade | NicsFailed) and vm.receiving is None
        if isinstance(message, VmExited) or unstarted:  # its process has ended, or was never started
            self.network.release(vmid)
            self.vm_ended(vm, OUR_FAULT)
        elif isinstance(message, SAID_ONCE):
            self.kill(vm)
        else:
            self._answer_overtaken(vm, errno.EIO, OUR_FAULT)

    def _answer_overtaken(self, vm: Vm, code: int, text: str) -> None:
        """A VM process has ended: answer the clients that wait for it to do something else."""
        self.on_gone(vm)
        if vm.receiving is not None and vm.receiving.resumed and not vm.receiving.unbuilt:
            code = VMD_IN_DOUBT  # its guest may have begun to run
        name = f"vm {vm.name}: "  # some sentences begin with it already
        failed = Failed(code=code, text=brief(name + text.removeprefix(name)))
        vm.changing = None
        self.clients.answer_all(For.PAUSE, vm.vmid, failed)
        self.clients.take(For.CARRYING, vm.vmid)
        self.clients.answer_all(For.CHANGE, vm.vmid, failed)
        self.clients.answer_all(For.TRANSFER, vm.vmid, vm.drop_transfer() or failed)

    def _reset_done(self, vm: Vm) -> None:
        """A VM killed by `vmctl reset` has ended: start its successor, if any.

        After the last one, answer the resets and number from 1 again.
        """
        if not any(other.resetting for other in self.vms):
            self.vms.forget_ids()
            self.clients.answer_all(For.RESET, 0, Ok())
        if vm.successor is not None:
            reload.register(self.vms, [vm.successor])
            if self.batch_timer is None:
                self.start_batch()

    def end_after_last_vm(self) -> None:
        """End the daemon after the last VM.  The viewers of consoles have LAST_OUTPUT_S to read the last output."""
        if self.core.ending and not any(vm.alive for vm in self.vms):
            self.consoles.when_left(self.core.loop.stop, LAST_OUTPUT_S)
