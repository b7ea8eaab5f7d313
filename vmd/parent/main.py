"""parent ("vmd"): the root process; knows every VM, decides who may do what, opens files.

Runs as  root; the only process that sees the host's file system
Peers    control (requests of vmctl), vmm (VM processes), priv (network); all started here
Holds    the configuration, the VM table, the file of identities, consoles; a VM's boot files only until vmm has them;
         descriptors of guests' memory, which it neither maps nor reads, for how much of it there is
Parses   vm.conf, its own file of identities, and checked messages; never a byte a guest or an image wrote
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping

from vmd.config.check import ConfigErrors
from vmd.config.model import NAME_MAX, Config, VmConfig
from vmd.errors import HostError, InUse, OperatorError, PeerError, VmdError, sentence
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Timer
from vmd.ipc.messages import (
    REQUESTS,
    VMD_PARENT_INVALID,
    AskResolvers,
    Caller,
    ClientGone,
    ConsoleBreak,
    ConsoleRequest,
    ConsoleSnapshotEnd,
    ConsoleWatch,
    DevicesReported,
    DropsReported,
    End,
    Failed,
    KvmFd,
    Listen,
    ListRequest,
    LoadRequest,
    LogRequest,
    NetworkConfigured,
    NicsFailed,
    NicsMade,
    NicsRequest,
    Ok,
    Outcome,
    PauseDone,
    PauseRequest,
    PauseVm,
    Proc,
    Quit,
    Ready,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveRequest,
    ReloadRequest,
    Request,
    ResetRequest,
    SendDone,
    SendRequest,
    SetVerbosity,
    StartRequest,
    StartVm,
    StopAccepted,
    StopMode,
    StopRequest,
    StopVm,
    SwitchesRequest,
    SwitchInfo,
    TransferProgress,
    VmExited,
    VmFailed,
    VmPaused,
    VmRequest,
    VmRunning,
    VmStarted,
    VmTerminated,
    WaitRequest,
    brief,
)
from vmd.ipc.process import Process
from vmd.log import log
from vmd.parent import endings, instances, reload, service, transfers
from vmd.parent.access import may_control, not_allowed, require_readable, require_root
from vmd.parent.children import Children
from vmd.parent.clients import For
from vmd.parent.consoles import Consoles
from vmd.parent.core import Core
from vmd.parent.identity import StateFile
from vmd.parent.limits import require_files, require_room
from vmd.parent.media import Media, holder, replaced
from vmd.parent.network import Network
from vmd.parent.options import Options
from vmd.parent.report import describe
from vmd.parent.requests import (
    checked_request,
    described,
    one_shot_config,
    require_startable,
)
from vmd.parent.resources import open_boot_files
from vmd.parent.usage import is_memory
from vmd.parent.vmtable import State, Vm
from vmd.record import Record, RecordType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from vmd.ipc.process import Handlers
    from vmd.parent.disks import Prober

    R = TypeVar("R")
    M = TypeVar("M", bound=Record)

STOP_GRACE_S = 120.0  # what running guests get when the daemon ends, as `vmctl stop` gives them
LAST_OUTPUT_S = 2.0  # for viewers to read what the last guest printed
NOTES_MAX = 30
NOTES_BYTES_MAX = 12288  # of all together
ERRORS_BYTES_MAX = 8000  # of the errors of a configuration; half of what a message has room for

# (path, what is known, whom to warn) -> the file as a configuration; None is the main file, read for itself
LoadConfig = Callable[[str | None, Config | None, Callable[[str], None]], Config]


def on(
    room: "type[R]", handler: "Callable[[R, M, Envelope], None]"
) -> "Callable[[Parent, M, Envelope, Channel], None]":
    """Return the handler of a message that is for a room of the parent."""

    def handle(parent: "Parent", message: "M", envelope: Envelope, _channel: Channel) -> None:
        handler(parent.rooms[room], message, envelope)

    return handle


class Parent(Process):
    """The daemon's state and its reactions to messages."""

    def __init__(
        self, options: Options, config: Config, load_config: LoadConfig, state: StateFile | None = None
    ) -> None:
        """`state`, if there is one, is where identities are kept; ours from here on."""
        super().__init__(Proc.PARENT)
        self.options = options
        self.load_config = load_config
        self.state = state
        self.saving: Timer | None = None
        self.core = core = Core(self.loop, config, verbosity=options.verbosity)
        self.vms, self.peers, self.clients = core.vms, core.peers, core.clients
        if state is not None:
            state.load(self.vms.identities)
            self.vms.identities.on_change = self.save_soon
        self.consoles = Consoles(core)
        self.network = Network(core, self.consoles.repeat_snapshots)
        self.rooms: dict[type, Any] = {type(room): room for room in (self, self.consoles, self.network)}
        self.ready: set[Proc] = set()
        self.warned: set[str] = set()
        self.prober: Prober
        self.listener: socket.socket | None = None  # until clients can be served
        self.batch_timer: Timer | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.register_config(config)

    def save_soon(self) -> None:
        """Have identities written before the next message is looked at; many changes are written once."""
        if self.saving is None:
            self.saving = self.loop.call_later(0, self.save)

    def save(self) -> None:
        """Write identities."""
        self.saving = None
        if self.state is not None:
            self.state.save(self.vms.identities)

    # --- start-up and end --------------------------------------------------------------------------------

    def start(self, children: Children, listener: socket.socket, kvm_fd: int) -> None:
        """Start control, vmm and priv and hand them what only root could open."""
        self.prober = children.prober
        for proc in (Proc.PRIV, Proc.CONTROL, Proc.VMM):
            ours, theirs = socketpair()
            children.start(proc, theirs)
            theirs.close()
            self.peers.channels[proc] = self.attach(ours, proc, proc.name.lower(), on_lost=self.on_child_lost)
        self.peers.send(Proc.VMM, KvmFd(), fds={"kvm": [kvm_fd]})
        self.listener = listener
        self.loop.on_signal(signal.SIGTERM, self.on_terminate)
        self.loop.on_signal(signal.SIGINT, self.on_terminate)
        self.loop.on_signal(signal.SIGHUP, self.on_hangup)
        for signum in (signal.SIGPIPE, signal.SIGUSR1):
            self.loop.on_signal(signum, lambda: None)

    def on_process_ready(self, message: Ready, _envelope: Envelope, channel: Channel) -> None:
        """A child is confined.  After the last one, priv is told what the network is to be."""
        for warning in set(message.warnings) - self.warned:
            self.warned.add(warning)  # once, not by each process
            log.warn(warning)
        if channel.peer in self.ready:
            raise PeerError(channel.label, "is ready twice")
        self.ready.add(channel.peer)
        if len(self.ready) == len(self.peers.channels):
            self.network.configure(self.core.config)

    def serve(self, listener: socket.socket) -> None:
        """Serve clients and start VMs: every process has been told what it needs for that."""
        self.listener = None
        self.peers.send(Proc.CONTROL, Listen(), fds={"listener": [listener.detach()]})
        log.info("startup")
        self.on_ready()
        self.start_batch()

    def on_child_lost(self, channel: Channel, error: PeerError | None) -> None:
        """A child process has died or cannot be trusted: the daemon cannot go on without it (*cat. 9.2*)."""
        del self.peers.channels[channel.peer]
        if not self.core.ending:
            log.crit(str(error) if error else f"lost child: {channel.label}")
            self.exit_status = 1
        if channel.peer is Proc.VMM:
            self.loop.stop()  # with it went every VM
            return
        if channel.peer is Proc.PRIV:
            self.network.on_priv_lost()
        if not self.core.ending:
            self.on_terminate()

    def on_terminate(self) -> None:
        """End the daemon: guests are asked to shut down; a second signal, or 120 s, kills them."""
        alive = [vm for vm in self.vms if vm.alive]
        if not alive:
            self.core.ending = True
            self.end_if_over()
            return
        mode = StopMode.KILL if self.core.ending else StopMode.GRACEFUL
        if not self.core.ending:
            log.info(f"stopping {len(alive)} VMs, {STOP_GRACE_S:.0f} s at most")
            service.notify("STOPPING=1")
            self.loop.call_later(STOP_GRACE_S, self.on_terminate)
        self.core.ending = True
        for vm in alive:
            vm.begin_stop(force=True)
            self.stop_process(vm, mode)

    def stop_process(self, vm: Vm, mode: StopMode) -> None:
        """End a VM's process; one that has none yet, for it waits for its interfaces, has ended with that."""
        if self.network.give_up(vm) and vm.receiving is None:
            self.vm_is_gone(vm, "stopped before its guest began", endings.KILLED)
        else:
            self.peers.send(Proc.VMM, StopVm(vmid=vm.vmid, mode=mode))

    def finish(self) -> None:
        """Tell the children to end; whoever does not listen dies with us."""
        self.core.ending = True
        if self.listener is not None:
            self.listener.close()
        for channel in self.peers.channels.values():
            channel.send(Quit())
            channel.flush_blocking(1.0)
        self.consoles.close()
        self.network.close()
        if self.state is not None:
            if self.saving is not None:
                self.save()
            self.state.close()

    # --- configuration -----------------------------------------------------------------------------------

    def register_config(self, config: Config) -> list[str]:
        """Add the VMs of a configuration; names already known are left alone (*cat. 2.5*).

        Returns what is worth telling the operator.
        """
        vms, problems = self.resolved(config)
        for note in reload.register(self.vms, vms):
            log.debug(note)
        return problems

    def resolved(self, config: Config) -> tuple[list[VmConfig], list[str]]:
        """Return the VMs of a configuration with what instances inherit, and why some cannot be."""
        vms, problems = instances.resolve(config.vms, self.template)
        for problem in problems:
            log.error(problem)
        return vms, problems

    def template(self, name: str) -> VmConfig | None:
        """Return the description of a VM that is known."""
        vm = self.vms.find(0, name)
        return vm.config if vm and not vm.doomed else None

    def start_batch(self) -> None:
        """Start as many waiting VMs as one round allows, and come back for the rest (*cat. 2.9*)."""
        if self.listener is not None:
            return  # `serve` will
        if self.batch_timer is not None:
            self.batch_timer.cancel()
            self.batch_timer = None
        settings = self.core.config.settings
        room = settings.start_parallel or os.cpu_count() or 1
        for vm in self.vms:
            if vm.state is not State.WAITING or self.core.ending:
                continue
            if room == 0:
                self.batch_timer = self.loop.call_later(settings.start_delay_s, self.start_batch)
                return
            room -= 1
            try:
                self.start_vm(vm, uid=vm.config.owner.uid)
            except VmdError as error:
                vm.leave_queue(str(error).removeprefix(f"vm {vm.name}: "))
                log.error(f"vm {vm.name}: {vm.text}")

    def reload(self) -> list[str]:
        """Read the main file anew; a file that does not parse changes nothing.

        Returns what is worth telling the operator.  Raises ConfigErrors.
        """
        config, warnings = self.load(None, None)
        warnings += self.network.configure(config)
        vms, problems = self.resolved(config)
        notes = reload.replace_all(self.vms, vms)
        self.take_effect(config)
        for note in notes:
            log.info(note)
        return warnings + problems + notes

    def load(self, path: str | None, known: Config | None) -> tuple[Config, list[str]]:
        """Return what a file says, and what is odd about it, which is logged, too.  Raises ConfigErrors."""
        warnings: list[str] = []

        def warn(text: str) -> None:
            log.warn(text)
            warnings.append(text)

        return self.load_config(path, known, warn), warnings

    def apply(self, config: Config) -> list[str]:
        """Make what a further file says part of the configuration in force; returns what is worth telling of it."""
        warnings = self.network.configure(config)
        problems = warnings + self.register_config(config)
        self.take_effect(config)
        return problems

    def take_effect(self, config: Config) -> None:
        """Let the global settings of a configuration count, and start what waits.

        Unlike vmd, a reload does not start a batch before its time: the host is as busy as it was.
        """
        self.core.config = config
        service.own_socket(self.options.socket_path, config.settings.socket_owner)
        waited = self.batch_timer
        if waited is None or waited.callback is None:
            self.start_batch()
            return
        waited.cancel()
        left_s = min(config.settings.start_delay_s, max(0.0, waited.due_s - time.monotonic()))
        self.batch_timer = self.loop.call_later(left_s, self.start_batch)

    def on_hangup(self) -> None:
        """SIGHUP reloads."""
        try:
            self.reload()
        except ConfigErrors as errors:
            log_errors(errors)
        except VmdError as error:
            log.error(f"configuration not reloaded: {error}")

    # --- starting and ending VMs -------------------------------------------------------------------------

    def start_vm(
        self,
        vm: Vm,
        *,
        uid: int,
        config: VmConfig | None = None,
        given_boot: int | None = None,
        given_initrd: int | None = None,
        again: bool = False,
    ) -> None:
        """Open what the VM needs and have vmm start it, `again` after a reset.  Owns the given descriptors.

        `config` differs from the VM's own for a one-shot boot.  Raises OperatorError or HostError; the VM is
        then as it was.
        """
        config = config or vm.config
        once = vm.from_config and (config != vm.config or given_boot is not None or given_initrd is not None)
        files = open_boot_files(config, given_boot, given_initrd)
        media = Media()
        try:
            require_startable(config, bootable=given_boot is not None or again)
            self.check_startable(vm, config, again=again)
            try:
                media = Media.open(config, self.prober, patience_s=vm.patience_s())
            except InUse as error:
                raise holder(error, vm, self.vms) from None
            fresh_console, began = vm.open_console(), False
            assert vm.pty is not None
            try:
                vm.pty.give_to(uid, vm.config.owner.gid)
                vm.begin_start(again=again)
                began = True
                if not again:  # its guest has changed nothing of what these say
                    self.note(vm, config, media.notes + self.network.notes(config))
                files_now = media.files()
                for what in replaced(vm.files, files_now) if again else ():
                    log.warn(f"vm {vm.name}: {what} is not the file that its guest had before it was reset")
                vm.files = files_now
                console = vm.console_fds()
                message = StartVm(
                    vmid=vm.vmid,
                    config=config,
                    boot_name=files.boot_name,
                    verbosity=self.core.verbosity,
                    disks=media.describe(),
                )
                fds = {"boot": [files.take_boot()], "initrd": files.take_initrd(), **console}
                fds |= {"disks": media.take_disks(), "cdrom": media.take_cdrom()}
                self.network.launch(vm, message, fds, lambda code, text: self.start_failed(vm, code, text))
            except (VmdError, ValueError, OverflowError) as error:
                if began:
                    vm.ended(brief(str(error)))
                if fresh_console:
                    vm.drop_pty()
                raise
        finally:
            files.close()
            media.close()
        vm.uid = uid
        vm.once_because = endings.ONCE.get(config.boot_device, endings.ONLY_THAT_START if once else "")

    def note(self, vm: Vm, config: VmConfig, notes: list[str]) -> None:
        """Log what should be known of a start, and keep it for the clients that wait for that start."""
        vm.notes = brief_notes(notes)
        where = f"{config.origin}: " if config.origin else ""
        for note in vm.notes:
            log.warn(f"{where}vm {vm.name}: {note}")

    def start_failed(self, vm: Vm, code: int, text: str) -> None:
        """A VM could not get its interfaces: it ends, as if vmm had said that it did."""
        vm.code = code
        log.error(f"vm {vm.name}: {text}")
        self.vm_is_gone(vm, brief(text))

    def check_startable(self, vm: Vm, config: VmConfig, *, again: bool = False) -> None:
        """Raise OperatorError if this host cannot, or may not, run such a VM; one that runs stays within the limits."""
        require_files()
        if again:
            return
        others = (other.running_config or other.config for other in self.vms if other.alive and other is not vm)
        require_room(config, others, self.core.config.settings)

    def on_vm_running(self, message: VmRunning, envelope: Envelope, _channel: Channel) -> None:
        """The guest executes."""
        vm = self.vms.alive(message.vmid)
        memory = envelope.take_fd("memory")
        if memory is not None and is_memory(memory):
            vm.take_memory(memory)
        elif memory is not None:
            os.close(memory)
            log.warn(f"vm {vm.name}: its process does not show how much memory it uses")
        if vm.receiving is not None:
            transfers.on_received_running(self, vm, message.pid, paused=message.paused)
            return
        vm.begin_run(message.pid)
        assert vm.pty is not None
        log.info(f"started {vm.name} (vm {vm.vmid}) successfully, tty {vm.pty.path}")
        started = VmStarted(vmid=vm.vmid, name=vm.name, pid=message.pid, tty=vm.pty.path, notes=vm.notes)
        self.clients.answer_all(For.START, vm.vmid, started)

    def on_vm_failed(self, message: VmFailed, _envelope: Envelope, _channel: Channel) -> None:
        """The VM could not be built; VmExited follows, cleans up, and answers whoever wanted to start it."""
        vm = self.vms.alive(message.vmid)
        vm.text, vm.code = brief(message.text), message.code
        log.error(f"vm {vm.name}: {message.text}")

    def on_vm_exited(self, message: VmExited, _envelope: Envelope, _channel: Channel) -> None:
        """The VM process is gone: start it again after a guest reset, else forget what it held."""
        vm = self.vms.alive(message.vmid)
        text = brief((vm.receiving.failure if vm.receiving else "") or message.text or vm.text)
        asked = vm.state is State.STOPPING
        how = endings.how_it_ended(message.outcome, asked=asked, sent=vm.sent is not None)
        if vm.receiving is not None and vm.receiving.failure:
            how = endings.FAILED
        elif how == endings.STOPPED and message.outcome is Outcome.REBOOT:
            text = endings.AS_ASKED
        elif how == endings.REBOOTED and vm.receiving is None:
            uid = vm.uid
            if vm.once_because:
                text = endings.not_again(vm.once_because)
            elif not vm.restarts.may_restart():
                text = "restarted too quickly"
                log.error(f"vm {vm.vmid} {text}")
            else:
                vm.begin_reset()
                log.info(f"{vm.name}: rebooting (vm {vm.vmid})")
                try:
                    boot, initrd = vm.kept_files()
                    self.start_vm(
                        vm, uid=uid, config=vm.running_config, given_boot=boot, given_initrd=initrd, again=True
                    )
                except VmdError as error:
                    vm.uid = uid  # whose console it still is
                    how, text = endings.FAILED, f"cannot reboot: {error}"
                    log.error(f"vm {vm.name}: {text}")
                else:
                    vm.once_because = ""
                    vm.guest_resets += 1
                    self.network.answer_counted(vm.vmid)
                    self.answer_overtaken(vm, errno.EAGAIN, "was reset by its guest meanwhile")
                    return
        self.network.give_up(vm)  # it was being received, and waited for its interfaces
        self.network.release(vm.vmid)
        self.vm_is_gone(vm, text, how)

    def vm_is_gone(self, vm: Vm, text: str, how: str = endings.FAILED) -> None:
        """Forget what a VM held, and tell those who wait for it."""
        log.info(f"{vm.name}: terminated vm {vm.vmid}{': ' + text if text else ''}")
        terminated = VmTerminated(vmid=vm.vmid, name=vm.name, text=text, how=how)
        self.clients.answer_all(For.END, vm.vmid, terminated)
        self.network.answer_counted(vm.vmid)
        self.consoles.on_ended(vm)
        vm.ended(text, how)
        vm.drop_files()  # a life that begins from the configuration boots what that names
        if not vm.from_config:
            self.vms.remove(vm)
        if vm.doomed:
            self.reset_done(vm)
        # Last, so that a client that tries again at once finds everything free.
        self.answer_overtaken(vm, vm.code, text or "has ended meanwhile")
        text = f"vm {vm.name}: {text or 'ended while it was starting'}"
        self.clients.answer_all(For.START, vm.vmid, Failed(code=vm.code, text=text))
        self.end_if_over()

    def end_if_over(self) -> None:
        """End with the last VM, when its viewer has seen how it ended or does not look."""
        if self.core.ending and not any(vm.alive for vm in self.vms):
            self.consoles.when_left(self.loop.stop, LAST_OUTPUT_S)

    def reset_done(self, vm: Vm) -> None:
        """A VM that was reset is gone: its name is free for who has asked for it, and with the last one all ids."""
        if not any(other.doomed for other in self.vms):
            self.vms.forget_ids()
            self.clients.answer_all(For.RESET, 0, Ok())
        if vm.successor is not None:
            reload.register(self.vms, [vm.successor])
            if self.batch_timer is None:
                self.start_batch()

    def answer_overtaken(self, vm: Vm, code: int, text: str) -> None:
        """Answer who wanted something of a VM process that has ended instead of doing it."""
        name = f"vm {vm.name}: "  # which some sentences have already
        failed = Failed(code=code, text=brief(name + text.removeprefix(name)))
        self.clients.answer_all(For.PAUSE, vm.vmid, failed)
        self.clients.answer_all(For.TRANSFER, vm.vmid, vm.drop_transfer() or failed)

    # --- requests of vmctl -------------------------------------------------------------------------------

    def on_request(self, message: Request, envelope: Envelope, _channel: Channel) -> None:
        """Serve a request of a client; every failure is answered with its sentence."""
        if message.caller is None:
            raise PeerError("control", f"{type(message).__name__} without a caller")
        try:
            if isinstance(message, VmRequest) and len(message.name) > NAME_MAX:
                raise OperatorError(errno.EINVAL, f"vm name too long: {message.name[:NAME_MAX]}...")
            room, serve = SERVES[type(message)]
            serve(self.rooms[room], message, message.caller, envelope)
        except OperatorError as error:
            self.clients.fail(envelope.peerid, error.code, str(error))
        except HostError as error:
            self.clients.fail(envelope.peerid, error.errno, str(error))
        except ConfigErrors as errors:
            log_errors(errors)
            self.clients.answer(envelope.peerid, Failed(code=errno.EINVAL, text=brief_errors(errors)))
        except (ValueError, OverflowError) as error:  # a path with a NUL, an id beyond 32 bits; from root only
            self.clients.fail(envelope.peerid, errno.EINVAL, str(error))
        except OSError as error:  # the host has run out of something, and this client has to hear of it
            what = sentence(error)
            log.error(f"{type(message).__name__}: {what}")
            self.clients.fail(envelope.peerid, error.errno or errno.EIO, what)

    def serve_start(self, message: StartRequest, caller: Caller, envelope: Envelope) -> None:
        """Start a VM that is known, or register the one described and start that."""
        if self.core.ending:
            raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
        boot, initrd = envelope.take_fd("kernel"), envelope.take_fd("initrd")
        try:
            if message.template or message.config is not None:
                wanted = described(message, given_boot=boot is not None, given_initrd=initrd is not None)
                if message.template:
                    wanted = self.instance(message.template, wanted, caller)
                else:
                    require_root(caller, "start a VM that vm.conf does not describe")
                    wanted = checked_request(wanted, bootable=boot is not None)
                vm = self.vms.add(wanted, from_config=False)
                try:
                    vm.keep_files(boot, initrd)
                except HostError:
                    self.vms.remove(vm)
                    raise
            else:
                vm = self.vms.get(message.vmid, message.name)
                if not may_control(caller, vm.config.owner.uid, vm.config.owner.gid):
                    raise not_allowed(caller, f"start vm {vm.name}", vm.config.owner.uid, vm.config.owner.gid)
                vm.require_startable()
                for fd in (boot, initrd):
                    if fd is not None:
                        require_readable(fd, "boot image", caller)
        except BaseException:
            for fd in (boot, initrd):
                if fd is not None:
                    os.close(fd)
            raise
        config = one_shot_config(vm.config, message)
        try:
            self.start_vm(vm, uid=caller.uid, config=config, given_boot=boot, given_initrd=initrd)
        except (VmdError, ValueError, OverflowError):
            if not vm.from_config:
                self.vms.remove(vm)
            raise
        vm.restarts.started_by_user()
        self.clients.wait(envelope.peerid, For.START, vm.vmid)

    def instance(self, name: str, wanted: VmConfig, caller: Caller) -> VmConfig:
        """Return what an instance of a template is, of which a client has described some.  Raises OperatorError."""
        template = self.template(name)
        if template is None:
            raise OperatorError(VMD_PARENT_INVALID, f"vm {wanted.name}: template {name} not found")
        if self.vms.find(0, wanted.name) is not None:
            raise OperatorError(errno.EEXIST, f"vm {wanted.name} already exists")
        config = instances.derive(template, wanted, caller)
        if caller.uid:
            instances.require_free(self.vms, wanted)
        return checked_request(config, bootable=bool(config.kernel)).replace(parent=template.name)

    def serve_stop(self, message: StopRequest, caller: Caller, envelope: Envelope) -> None:
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

    def serve_pause(self, message: PauseRequest, caller: Caller, envelope: Envelope) -> None:
        """Have a VM stand still, or go on."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "pause" if message.paused else "unpause")
        vm.require_pausable()
        if message.paused and vm.receiving is not None:  # it has not even begun to run here
            self.clients.answer(envelope.peerid, VmPaused(vmid=vm.vmid, name=vm.name, paused=True))
            return
        self.clients.wait(envelope.peerid, For.PAUSE, vm.vmid)
        if not message.paused and transfers.unpause(self, vm):
            return
        self.peers.send(Proc.VMM, PauseVm(vmid=vm.vmid, paused=message.paused))

    def on_pause_done(self, message: PauseDone, _envelope: Envelope, _channel: Channel) -> None:
        """A VM stands still, or goes on, or could not do what was asked."""
        vm = self.vms.alive(message.vmid)
        vm.pause_changed(paused=message.paused)
        client = self.clients.take_first(For.PAUSE, vm.vmid)
        if message.text:
            log.error(f"vm {vm.name}: {message.text}")
            self.clients.fail(client, errno.EIO, f"vm {vm.name}: {message.text}")
            return
        log.info(f"{vm.name}: {'paused' if message.paused else 'unpaused'} vm {vm.vmid} successfully")
        self.clients.answer(client, VmPaused(vmid=vm.vmid, name=vm.name, paused=message.paused))

    def serve_wait(self, message: WaitRequest, caller: Caller, envelope: Envelope) -> None:
        """Answer when the VM is gone."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "wait for")
        if not vm.alive:
            raise OperatorError(errno.EINVAL, f"vm {vm.name} is not running")
        if self.clients.waits(envelope.peerid, For.END, vm.vmid):
            raise OperatorError(errno.EALREADY, f"vm {vm.name} is already waited for")
        self.clients.wait(envelope.peerid, For.END, vm.vmid)

    def serve_list(self, _message: ListRequest, caller: Caller, envelope: Envelope) -> None:
        """Describe every VM; whoever may open the socket sees them all (*cat. 3.3*)."""
        for vm in self.vms:
            self.clients.answer(envelope.peerid, describe(vm, self.network.infos(vm), caller))
        self.clients.answer(envelope.peerid, End())

    def serve_switches(self, _message: SwitchesRequest, _caller: Caller, envelope: Envelope) -> None:
        """Name every switch; whoever may open the socket sees them all."""
        for switch in self.core.config.switches:
            self.clients.answer(envelope.peerid, SwitchInfo(name=switch.name, interface=switch.interface))
        self.clients.answer(envelope.peerid, End())

    def serve_load(self, message: LoadRequest, caller: Caller, envelope: Envelope) -> None:
        """Read a further file; VMs it names again are left as they are."""
        require_root(caller, "load a configuration")
        loaded, warnings = self.load(message.path, self.core.config)
        notes = warnings + self.apply(loaded.replace(switches=(*self.core.config.switches, *loaded.switches)))
        self.clients.answer(envelope.peerid, Ok(notes=brief_notes(notes)))

    def serve_reload(self, _message: ReloadRequest, caller: Caller, envelope: Envelope) -> None:
        """Read the main file anew."""
        require_root(caller, "reload the configuration")
        self.clients.answer(envelope.peerid, Ok(notes=brief_notes(self.reload())))

    def serve_reset(self, message: ResetRequest, caller: Caller, envelope: Envelope) -> None:
        """Terminate and forget VMs, forget switches."""
        require_root(caller, "reset the configuration")
        if message.switches:
            self.core.config = self.core.config.replace(switches=())
            self.network.configure(self.core.config)
        if message.vms:
            self.reset_vms()
        if any(vm.doomed for vm in self.vms):
            self.clients.wait(envelope.peerid, For.RESET)  # a reload that follows finds all of them gone
        else:
            self.clients.answer(envelope.peerid, Ok())

    def reset_vms(self) -> None:
        """Forget every VM, as soon as it has ended where it runs."""
        for vm in self.vms:
            vm.from_config, vm.next_config, vm.successor = False, None, None
            vm.doomed = vm.alive
        for vm in list(self.vms):
            if vm.doomed:
                vm.begin_stop(force=True)
                self.stop_process(vm, StopMode.KILL)
            else:
                self.vms.remove(vm)
        self.vms.forget_ids()

    def serve_log(self, message: LogRequest, caller: Caller, envelope: Envelope) -> None:
        """Change the verbosity of every process, now and for those to come."""
        require_root(caller, "change the log level")
        self.core.verbosity = log.verbosity = max(0, min(2, message.verbosity))
        self.peers.send_all(SetVerbosity(verbosity=self.core.verbosity))
        self.clients.answer(envelope.peerid, Ok())

    def on_client_gone(self, _message: ClientGone, envelope: Envelope, _channel: Channel) -> None:
        """A client has disconnected: nothing waits for it any more, and its console is free."""
        self.consoles.on_client_gone(envelope.peerid)
        for wait in self.clients.gone(envelope.peerid):
            vm = self.vms.find(wait.vmid, "")
            if wait.what is For.TRANSFER and vm is not None:
                transfers.on_client_gone(self, vm)

    def on_network_configured(self, message: NetworkConfigured, envelope: Envelope, _channel: Channel) -> None:
        """Hear what switches could not be had.  With the first answer of priv the daemon is up."""
        self.network.on_configured(message, envelope)
        if self.listener is not None and len(self.ready) == len(self.peers.channels):
            self.serve(self.listener)

    HANDLERS: "Handlers" = {
        **dict.fromkeys(((proc, Ready) for proc in (Proc.CONTROL, Proc.VMM, Proc.PRIV)), on_process_ready),
        (Proc.VMM, VmRunning): on_vm_running,
        (Proc.VMM, VmFailed): on_vm_failed,
        (Proc.VMM, VmExited): on_vm_exited,
        (Proc.VMM, PauseDone): on_pause_done,
        (Proc.VMM, SendDone): transfers.on_send_done,
        (Proc.VMM, TransferProgress): transfers.on_progress,
        (Proc.VMM, ReceivedHeader): transfers.on_received_header,
        (Proc.VMM, ReceivedMachine): transfers.on_received_machine,
        (Proc.VMM, DevicesReported): on(Network, Network.on_reported),
        (Proc.VMM, AskResolvers): on(Network, Network.on_ask_resolvers),
        (Proc.VMM, ConsoleSnapshotEnd): on(Consoles, Consoles.on_snapshot_end),
        (Proc.PRIV, NetworkConfigured): on_network_configured,
        (Proc.PRIV, DropsReported): on(Network, Network.on_drops),
        (Proc.PRIV, NicsMade): on(Network, Network.on_made),
        (Proc.PRIV, NicsFailed): on(Network, Network.on_failed),
        (Proc.CONTROL, ClientGone): on_client_gone,
        **dict.fromkeys(((Proc.CONTROL, request) for request in REQUESTS), on_request),
    }


SERVES: Mapping[RecordType, tuple[type, Callable[..., None]]] = {
    StartRequest: (Parent, Parent.serve_start),
    StopRequest: (Parent, Parent.serve_stop),
    WaitRequest: (Parent, Parent.serve_wait),
    PauseRequest: (Parent, Parent.serve_pause),
    SendRequest: (Parent, transfers.serve_send),
    ReceiveRequest: (Parent, transfers.serve_receive),
    ListRequest: (Parent, Parent.serve_list),
    SwitchesRequest: (Parent, Parent.serve_switches),
    NicsRequest: (Network, Network.serve),
    LoadRequest: (Parent, Parent.serve_load),
    ReloadRequest: (Parent, Parent.serve_reload),
    ResetRequest: (Parent, Parent.serve_reset),
    LogRequest: (Parent, Parent.serve_log),
    ConsoleRequest: (Consoles, Consoles.serve),
    ConsoleWatch: (Consoles, Consoles.serve_watch),
    ConsoleBreak: (Consoles, Consoles.serve_break),
}


def brief_notes(notes: list[str]) -> tuple[str, ...]:
    """Return notes as far as they fit a message."""
    shown: list[str] = []
    room = NOTES_BYTES_MAX
    for note in map(brief, notes[:NOTES_MAX]):
        room -= len(os.fsencode(note))
        if room < 0:
            break
        shown.append(note)
    left = len(notes) - len(shown)
    return (*shown, f"and {left} more; see the log") if left else tuple(shown)


def log_errors(errors: ConfigErrors) -> None:
    """Log why a configuration was not taken, error by error."""
    for line in str(errors).splitlines():
        log.error(line)
    log.error(errors.summary)


def brief_errors(errors: ConfigErrors) -> str:
    """Return errors as far as they fit a message, a line for each, and what follows from them."""
    lines = [brief(line) for line in str(errors).splitlines()]
    shown: list[str] = []
    room = ERRORS_BYTES_MAX
    for line in lines:
        room -= len(os.fsencode(line)) + 1
        if room < 0 and shown:
            shown.append(f"and {len(lines) - len(shown)} more; see the log")
            break
        shown.append(line)
    return "\n".join((*shown, errors.summary))
