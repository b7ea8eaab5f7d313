"""The states of one VM: what changes them, what is refused in which state, and which events are reported."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import NicConfig, Owner, Prefix, VmConfig
from vmd.errors import VMD_VM_STOP_INVALID, HostError, OperatorError
from vmd.ipc.messages.clients import VmSent
from vmd.memfile import CONSTANT, memory_file, seal, sealed_file
from vmd.parent import endings
from vmd.parent import vm as module
from vmd.parent.vm import ALIVE, LOCKS_LINGER_S, SHOWN_BYTES_MAX, DeviceChange, Receiving, State, Vm

CONFIG = VmConfig(name="a", owner=Owner(uid=5))
SENT = VmSent(vmid=1, name="a", sent_bytes=1)
ADDRESS = Prefix(address=bytes((10, 0, 0, 2)), length=24)


class Seen(Vm):
    """A VM that keeps its events."""

    def __init__(self, state: State = State.STOPPED) -> None:
        super().__init__(1, CONFIG, from_config=True)
        self.restore_state(state)
        object.__setattr__(self, "seen", [])
        self.on_event = lambda _vm, *event: object.__getattribute__(self, "seen").append(event)

    def events(self) -> list[tuple[str, str, str]]:
        """Return the events since the last call."""
        seen: list[tuple[str, str, str]] = object.__getattribute__(self, "seen")
        found, seen[:] = seen[:], []
        return found


@pytest.fixture
def _nothing_left() -> Iterator[None]:
    """Check that a test leaves no descriptor."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def vm_in(state: State) -> Seen:
    """Return a VM that has come into a state in the usual way."""
    vm = Seen(State.RUNNING if state in (State.SENDING, State.SAVING, State.IN_DOUBT) else state)
    if state in (State.SENDING, State.SAVING):
        vm.begin_send(keep=False, state=state)
    if state is State.IN_DOUBT:
        vm.begin_send(keep=False, carried=True)
        vm.doubt("it may run elsewhere")
    if state is State.RECEIVING:
        vm.receiving = Receiving(paused=False)
    vm.events()
    return vm


STATES = tuple(State)
S = State
# For each step: the states that it begins in, each with the state after it.  In other states it is refused.
STEPS: dict[str, tuple[Callable[[Vm], object], dict[State, State]]] = {
    "enqueue": (lambda vm: vm.enqueue(), {S.STOPPED: S.WAITING, S.WAITING: S.WAITING}),
    "start": (lambda vm: vm.begin_start(7), {S.STOPPED: S.STARTING, S.WAITING: S.STARTING}),
    "receive": (
        lambda vm: vm.begin_receive(Receiving(paused=False)), dict.fromkeys((S.STOPPED, S.WAITING), S.RECEIVING)
    ),
    "work on disks": (lambda vm: vm.begin_disk_work("busy"), {S.STOPPED: S.STOPPED, S.WAITING: S.WAITING}),
    "change": (
        lambda vm: vm.begin_change(DeviceChange("disk0")), {state: state for state in (S.STOPPED, S.RUNNING, S.PAUSED)}
    ),
    "send": (lambda vm: vm.begin_send(keep=False), {S.RUNNING: S.SENDING, S.PAUSED: S.SENDING}),
    "save": (lambda vm: vm.begin_send(keep=True, state=S.SAVING), {S.RUNNING: S.SAVING, S.PAUSED: S.SAVING}),
    "stop": (
        lambda vm: vm.begin_stop(force=False),
        dict.fromkeys((S.STARTING, S.RUNNING, S.PAUSED, S.RECEIVING), S.STOPPING),
    ),
    "stop by force": (lambda vm: vm.begin_stop(force=True), dict.fromkeys(ALIVE, S.STOPPING)),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", STATES)
def test_what_may_begin_in_which_state(step: str, state: State) -> None:
    """What is refused changes nothing."""
    take, after = STEPS[step]
    vm = vm_in(state)
    if state in after:
        take(vm)
        assert vm.state is after[state]
    else:
        sending, receiving = vm.sending, vm.receiving
        with pytest.raises(OperatorError, match="vm a"):
            take(vm)
        assert (vm.state, vm.sending, vm.receiving, vm.changing, vm.disk_work) == (state, sending, receiving, None, "")
        assert vm.events() == []


@pytest.mark.parametrize(
    ("state", "take", "number", "words"),
    [
        (S.RUNNING, "start", errno.EALREADY, "vm a is already running"),
        (S.PAUSED, "start", errno.EALREADY, "vm a is paused"),
        (S.STARTING, "change", errno.EBUSY, "vm a is starting"),
        (S.STOPPED, "send", errno.EINVAL, "vm a is not running"),
        (S.STARTING, "send", errno.EINVAL, "vm a is starting"),
        (S.IN_DOUBT, "send", errno.EBUSY, "vm a is in doubt: it may run elsewhere; see `vmctl unpause -f`"),
        (S.STOPPED, "stop by force", VMD_VM_STOP_INVALID, "vm a is not running"),
        (S.STOPPING, "stop", errno.EALREADY, "vm a is already stopping"),
        (S.SENDING, "stop", errno.EBUSY, "vm a is being sent; interrupt that, or stop it by force"),
        (S.SAVING, "stop", errno.EBUSY, "vm a is paused for a snapshot; interrupt that, or stop it by force"),
        (
            S.IN_DOUBT, "stop", errno.EBUSY,
            "vm a is in doubt: it may run elsewhere; stop it by force, or see `vmctl unpause -f`",
        ),
    ],
)  # fmt: skip
def test_why_it_is_refused(state: State, take: str, number: int, words: str) -> None:
    """The error names the state, and what to do."""
    with pytest.raises(OperatorError) as refused:
        STEPS[take][0](vm_in(state))
    assert (refused.value.number, str(refused.value)) == (number, words)


@pytest.mark.parametrize("step", ["start", "enqueue", "receive", "work on disks", "change", "send"])
def test_what_a_change_of_a_device_excludes(step: str) -> None:
    """It would use the disks at the same time."""
    vm = vm_in(S.RUNNING if step == "send" else S.STOPPED)
    vm.begin_change(DeviceChange("disk0"))
    with pytest.raises(OperatorError, match="vm a: disk0 is being changed"):
        STEPS[step][0](vm)


@pytest.mark.parametrize("step", ["start", "enqueue", "receive", "work on disks", "change"])
def test_what_work_on_the_disks_excludes(step: str) -> None:
    """It ends when the work ends."""
    vm = vm_in(S.STOPPED)
    vm.begin_disk_work("its snapshots are being changed")
    with pytest.raises(OperatorError, match="vm a: its snapshots are being changed"):
        STEPS[step][0](vm)
    vm.end_disk_work()
    STEPS[step][0](vm)


@pytest.mark.parametrize("step", ["send", "change"])
def test_what_a_received_vm_cannot_do_without_its_disks(step: str) -> None:
    """It has no machine yet."""
    vm = vm_in(S.RECEIVING)
    assert vm.wait_for_disks("disk0 is in use")
    with pytest.raises(OperatorError, match="vm a still waits for its disks: disk0 is in use"):
        STEPS[step][0](vm)


# --- events -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "take", "after", "events"),
    [
        (S.STOPPED, lambda vm: vm.enqueue(), S.WAITING, [("waiting", "", "")]),
        (S.WAITING, lambda vm: vm.enqueue(), S.WAITING, []),
        (S.WAITING, lambda vm: vm.leave_queue(), S.STOPPED, [("stop", "was waiting for its start", "")]),
        (S.WAITING, lambda vm: vm.leave_queue("no room"), S.STOPPED, [("failed", "no room", "")]),
        (S.RUNNING, lambda vm: vm.leave_queue("no room"), S.RUNNING, []),
        (S.STOPPED, lambda vm: vm.begin_start(7), S.STARTING, [("start", "", "")]),
        (S.STOPPED, lambda vm: vm.begin_start(7, again=True), S.STARTING, [("reboot", "", "")]),
        (S.STOPPED, lambda vm: vm.begin_receive(Receiving(paused=True)), S.RECEIVING, [("receive", "", "")]),
        (S.STARTING, lambda vm: vm.begin_run(9), S.RUNNING, [("ready", "", "")]),
        (S.STOPPING, lambda vm: vm.begin_run(9), S.STOPPING, []),
        (S.RUNNING, lambda vm: vm.begin_reboot(), S.STOPPED, []),
        (S.RUNNING, lambda vm: vm.pause_changed(paused=True), S.PAUSED, [("pause", "", "")]),
        (S.PAUSED, lambda vm: vm.pause_changed(paused=True), S.PAUSED, []),
        (S.PAUSED, lambda vm: vm.pause_changed(paused=False), S.RUNNING, [("unpause", "", "")]),
        (S.STOPPING, lambda vm: vm.pause_changed(paused=True), S.STOPPING, []),
        (S.SENDING, lambda vm: vm.pause_changed(paused=True), S.SENDING, []),
        (S.RUNNING, lambda vm: vm.halted("no space"), S.PAUSED, [("pause", "", "")]),
        (S.RUNNING, lambda vm: vm.begin_send(keep=False), S.SENDING, [("send", "", "")]),
        (S.RUNNING, lambda vm: vm.begin_send(keep=False, carried=True), S.SENDING, [("migrate", "", "")]),
        (S.RUNNING, lambda vm: vm.begin_send(keep=True, state=S.SAVING), S.SAVING, [("saving", "", "")]),
        (S.SENDING, lambda vm: vm.stay(), S.RUNNING, [("resume", "", "")]),
        (S.SAVING, lambda vm: vm.stay(), S.RUNNING, [("resume", "", "")]),
        (S.IN_DOUBT, lambda vm: vm.stay(), S.RUNNING, [("resume", "", "")]),
        (S.SENDING, lambda vm: vm.doubt("why"), S.IN_DOUBT, [("in doubt", "why", "")]),
        (S.IN_DOUBT, lambda vm: vm.doubt("other"), S.IN_DOUBT, []),
        (S.STOPPING, lambda vm: vm.doubt("why"), S.STOPPING, []),
        (S.SENDING, lambda vm: vm.leave(SENT), S.STOPPING, [("sent", "", "")]),
        (S.STOPPING, lambda vm: vm.leave(SENT), S.STOPPING, []),
        (S.RECEIVING, lambda vm: vm.wait_for_disks("why"), S.PAUSED, [("pause", "why", "")]),
        (S.RUNNING, lambda vm: vm.wait_for_disks("why"), S.RUNNING, []),
        (S.PAUSED, lambda vm: vm.try_again(Receiving(paused=True)), S.RECEIVING, [("receive", "", "")]),
        (S.RECEIVING, lambda vm: vm.end_receive(9, paused=False), S.RUNNING, [("received", "", "")]),
        (S.RECEIVING, lambda vm: vm.end_receive(9, paused=True), S.PAUSED, [("received", "", "")]),
        (S.STOPPING, lambda vm: vm.end_receive(9, paused=False), S.STOPPING, []),
        (S.RUNNING, lambda vm: vm.begin_stop(force=False), S.STOPPING, [("stopping", "", "")]),
        (S.STOPPING, lambda vm: vm.begin_stop(force=True), S.STOPPING, []),
        (S.RUNNING, lambda vm: vm.ended("off", endings.POWERED_OFF), S.STOPPED, [("stop", "off", endings.POWERED_OFF)]),
        (S.STARTING, lambda vm: vm.ended("no kernel"), S.STOPPED, [("failed", "no kernel", endings.FAILED)]),
    ],
)  # fmt: skip
def test_each_change_of_its_state_is_an_event(
    state: State, take: Callable[[Vm], object], after: State, events: list[tuple[str, str, str]]
) -> None:
    """A step that changes no state reports none."""
    vm = vm_in(state)
    take(vm)
    assert (vm.state, vm.events()) == (after, events)


def test_a_running_vm_that_fails_has_crashed() -> None:
    """It had a process.  The last end is kept."""
    vm = vm_in(S.RUNNING)
    vm.pid = 9
    vm.ended("killed by SIGKILL")
    assert vm.events() == [("crash", "killed by SIGKILL", endings.FAILED)]
    assert vm.last_end is not None
    assert (vm.last_end.how, vm.last_end.text, vm.last_end.at_s) == (
        endings.FAILED, "killed by SIGKILL", int(vm.since_s)
    )  # fmt: skip


# --- what a step changes besides the state ----------------------------------------------------------------------


def test_lives_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that resets itself, or goes back to a snapshot, continues its life."""
    now_s = [100.0]
    monkeypatch.setattr("vmd.parent.vm.time.time", lambda: now_s[0])
    vm = Seen()
    vm.begin_start(7)
    assert (vm.starts, vm.started_s, vm.since_s, vm.uid) == (1, 100.0, 100.0, 7)
    vm.guest_resets, vm.text, vm.code, vm.going_back, now_s[0] = 3, "old", errno.ENOENT, True, 200.0
    vm.begin_reboot()
    vm.begin_start(7, again=True)
    assert (vm.starts, vm.started_s, vm.since_s, vm.guest_resets) == (1, 100.0, 200.0, 3)
    assert (vm.text, vm.code, vm.going_back) == ("", errno.EIO, False)
    vm.ended("off")
    vm.begin_receive(Receiving(paused=False))
    assert (vm.starts, vm.started_s, vm.guest_resets) == (2, 200.0, 0)


@pytest.mark.usefixtures("_nothing_left")
def test_what_the_end_of_a_life_leaves() -> None:
    """The next life has its own settings, and the owner as its user."""
    vm: Any = vm_in(S.RUNNING)
    vm.pid, vm.uid, vm.once_because, vm.changing = 9, 7, "installer", DeviceChange("disk0")
    vm.running_config, vm.next_config = CONFIG.replace(vcpus=2), CONFIG.replace(vcpus=3)
    vm.take_memory(memory_file("memory"))
    vm.take_figures(sealed_file("figures", 8))
    vm.ended("off")
    assert (vm.pid, vm.uid, vm.once_because, vm.changing, vm.text) == (0, 5, "", None, "off")
    assert (vm.config.vcpus, vm.running_config, vm.next_config) == (3, None, None)
    assert (vm.memory, vm.figures) == (None, None)
    vm.ended("again")
    assert vm.config.vcpus == 3


def test_locks_linger_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new VM does not wait for them, and one that has ended waits for a moment."""
    now_s = [5000.0]
    monkeypatch.setattr("vmd.parent.vm.time.monotonic", lambda: now_s[0])
    vm = Seen()
    assert vm.patience_s() == 0
    vm.ended("off")
    assert vm.patience_s() == LOCKS_LINGER_S
    now_s[0] += LOCKS_LINGER_S / 2
    assert vm.patience_s() == LOCKS_LINGER_S / 2
    now_s[0] += LOCKS_LINGER_S
    assert vm.patience_s() == 0


@pytest.mark.usefixtures("_nothing_left")
def test_a_reboot_ends_what_was_for_the_process() -> None:
    """The memory is kept for the new process's start, the figures are not."""
    vm: Any = vm_in(S.RUNNING)
    vm.pid, vm.changing = 9, DeviceChange("disk0")
    vm.take_figures(sealed_file("figures", 8))
    vm.begin_reboot()
    assert (vm.pid, vm.figures, vm.changing) == (0, None, None)


def test_the_reason_of_a_pause_goes_with_it() -> None:
    """The text of a VM that runs is empty."""
    vm = vm_in(S.RUNNING)
    assert vm.halted("no space")
    assert (vm.state, vm.text) == (S.PAUSED, "no space")
    assert not vm.halted("other")
    assert vm.text == "no space"
    vm.pause_changed(paused=False)
    assert vm.text == ""


@pytest.mark.parametrize("paused", [False, True])
def test_a_pause_during_a_send_is_for_afterwards(paused: bool) -> None:
    """The VM has that state if it stays here, and no reason any more."""
    vm = vm_in(S.SENDING)
    vm.pause_changed(paused=True)
    vm.pause_changed(paused=paused)
    vm.text = "sending"
    vm.stay()
    assert (vm.state, vm.text, vm.sending) == (S.PAUSED if paused else S.RUNNING, "", None)
    vm.text = "kept"
    vm.stay()
    assert vm.text == "kept"


def test_the_timer_of_a_doubt_ends_with_the_send() -> None:
    """There may be none."""

    class Retry:
        """A timer."""

        canceled = 0

        def cancel(self) -> None:
            """Count."""
            self.canceled += 1

    retry: Any = Retry()
    for end in (Vm.stay, Vm.drop_transfer, lambda vm: vm.leave(SENT)):
        for timer in (None, retry):
            vm = vm_in(S.IN_DOUBT)
            assert vm.sending is not None
            vm.sending.retry = timer
            end(vm)
            assert vm.sending is None
    assert retry.canceled == 3


def test_the_answer_for_the_client_that_had_it_sent() -> None:
    """It is given once."""
    vm = vm_in(S.SENDING)
    vm.leave(SENT)
    assert vm.drop_transfer() == SENT
    assert vm.drop_transfer() is None
    vm = vm_in(S.RECEIVING)
    assert vm.drop_transfer() is None
    assert vm.receiving is None


def test_a_doubt_has_its_newest_reason() -> None:
    """A VM that is not in doubt keeps its text."""
    vm = vm_in(S.IN_DOUBT)
    vm.doubt("it has run elsewhere")
    assert vm.text == "it has run elsewhere"
    vm = vm_in(S.RUNNING)
    vm.doubt("it has run elsewhere")
    assert (vm.state, vm.text) == (S.RUNNING, "")


def test_another_attempt_runs_the_guest() -> None:
    """`vmctl unpause` asks for that, even if the VM was to arrive paused."""
    vm: Any = vm_in(S.RECEIVING)
    vm.receiving.paused = True
    vm.wait_for_disks("disk0 is in use")
    vm.try_again(vm.receiving)
    assert (vm.state, vm.receiving.paused) == (S.RECEIVING, False)
    vm.end_receive(9, paused=False)
    assert (vm.receiving, vm.pid, vm.text) == (None, 9, "")


def test_who_has_left_the_queue() -> None:
    """The reason is shown, if there is one."""
    for why in ("", "no room"):
        vm = vm_in(S.WAITING)
        vm.text = "old"
        vm.leave_queue(why)
        assert vm.text == why


# --- what the next parent and other VMs must know ---------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_left")
def test_each_change_is_told() -> None:
    """The next parent must learn it, also of a change of the seed, which is no assignment."""
    vm = Seen()
    told: list[Vm] = []
    vm.on_change = told.append
    assert told == []
    before = vm.changes
    vm.text = "x"
    vm.new_seed()
    vm.drop_seed()
    vm.drop_seed()
    vm.changed()
    assert (told, vm.changes) == ([vm] * 4, before + 4)


def test_names_and_addresses_that_no_other_vm_may_have() -> None:
    """Those of this life and of the next one count; a tap that priv chooses does not."""
    free, chosen = NicConfig(), NicConfig(tap="tap")
    named, fixed, later = NicConfig(tap="tap7"), NicConfig(local=True, address=ADDRESS), NicConfig(tap="tap8")
    vm: Any = Seen()
    vm.config = CONFIG.replace(nics=(free, chosen, named))
    assert vm.claims == (named,)
    vm.running_config = CONFIG.replace(nics=(fixed,))
    vm.next_config = CONFIG.replace(nics=(later,))
    assert vm.claims == (named, fixed, later)
    vm.ended("off")
    assert vm.claims == (later,)


# --- descriptors ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_left")
def test_figures_that_can_be_resized_are_not_read() -> None:
    """vmm could send any file, and a read beyond its end would end the daemon."""
    vm = Seen()
    fixed = sealed_file("figures", 8)
    vm.take_figures(fixed)
    assert vm.figures == fixed
    vm.take_figures(memory_file("other"))
    assert vm.figures is None


@pytest.mark.usefixtures("_nothing_left")
def test_a_console_is_made_once() -> None:
    """It is new for the first process of a life, and the count of its output goes on."""
    vm = Seen()
    assert vm.take_console() is None
    assert vm.open_console()
    pty = vm.pty
    assert not vm.open_console()
    assert vm.pty is pty
    console = vm.take_console()
    assert console is not None
    assert (console[0], vm.pty, vm.backlog) == (pty, None, None)
    console[0].close()


@pytest.mark.usefixtures("_nothing_left")
def test_any_count_of_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM's process may write any, and the next life begins with a smaller one."""
    vm = Seen()
    vm.open_console()

    class Read:
        """The output, with a large count."""

        end = SHOWN_BYTES_MAX + 5

    monkeypatch.setattr(type(vm.backlog), "read", lambda _backlog: Read())
    vm.drop_pty()
    assert vm.shown_before == 5


@pytest.mark.usefixtures("_nothing_left")
def test_no_memory_for_a_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pty is closed again."""

    def create(_shown: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("vmd.parent.vm.Backlog.create", create)
    vm = Seen()
    with pytest.raises(HostError, match="keep the output of the console: Cannot allocate memory"):
        vm.open_console()
    assert vm.pty is None


@pytest.mark.usefixtures("_nothing_left")
def test_the_files_of_a_new_process() -> None:
    """They are copies.  The memory is a new, empty file for each process."""
    vm = Seen()
    vm.open_console()
    vm.kept = {name: memory_file(name) for name in ("kernel", "initrd", "seed")}
    sealed = vm.kept["kernel"]
    for fd in vm.kept.values():
        seal(fd, CONSTANT)
    fds = vm.process_fds()
    assert list(fds) == ["tty", "tty_slave", "shown", "memory", "boot", "initrd", "seed"]
    assert vm.memory is not None
    assert os.path.sameopenfile(fds["memory"][0], vm.memory)
    assert os.path.sameopenfile(fds["boot"][0], sealed)
    assert fds["boot"][0] != sealed
    for each in fds.values():
        os.close(each[0])
    vm.drop_files()
    assert vm.kept == {}
    vm.take_memory(None)
    vm.drop_pty()


@pytest.mark.usefixtures("_nothing_left")
@pytest.mark.parametrize(
    ("name", "arrives", "refused"),
    [("seed", True, False), ("seed", False, True), ("kernel", True, True), ("kernel", False, True)],
)
def test_only_constant_files_are_given(name: str, arrives: bool, refused: bool) -> None:
    """The process could otherwise change what the next life boots.  The stream of a VM that arrives fills the seed."""
    vm = Seen()
    vm.open_console()
    vm.kept = {name: memory_file(name)}
    if refused:
        with pytest.raises(HostError, match=f"keep the {name} of vm a"):
            vm.process_fds(arrives=arrives)
    else:
        for each in vm.process_fds(arrives=arrives).values():
            os.close(each[0])
    vm.drop_files()
    vm.take_memory(None)
    vm.drop_pty()


@pytest.mark.usefixtures("_nothing_left")
def test_a_host_without_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says for what."""

    def none(_name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    vm = Seen()
    vm.open_console()
    monkeypatch.setattr(module, "memory_file", none)
    for take, what in (
        (vm.new_seed, "keep a seed"),
        (lambda: vm.keep_files(["kernel"]), "keep the boot image of a client"),
        (vm.process_fds, "make a file for the guest's memory"),
    ):
        with pytest.raises(HostError, match=f"{what}: Too many open files"):
            take()
    assert vm.kept == {}
    vm.drop_pty()


@pytest.mark.usefixtures("_nothing_left")
def test_the_files_of_a_client_are_kept() -> None:
    """They are empty until an opener copies to them."""
    vm = Seen()
    vm.keep_files(["kernel", "initrd"])
    assert list(vm.kept) == ["kernel", "initrd"]
    vm.new_seed()
    vm.new_seed()
    assert list(vm.kept) == ["kernel", "initrd", "seed"]
    vm.drop_files()
