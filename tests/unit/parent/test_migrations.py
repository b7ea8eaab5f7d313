"""How the parent handles the messages of a migration from one host to another, without any process."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.parentvms import close_vms
from tests.unit.parent.test_transfers import (
    CLIENT,
    OTHER,
    ROOT,
    Parent,
    envelope,
    exited,
    leave,
    report_running,
    running,
)
from vmd.config.model import DiskConfig, NicConfig, Owner, VmConfig
from vmd.errors import VMD_IN_DOUBT, InUse, OperatorError
from vmd.fileid import FileId
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import (
    Failed,
    MigrateInRequest,
    MigrateRequest,
    MigrationAt,
    MigrationStep,
    PauseRequest,
    Step,
    VmPaused,
    VmReceived,
    VmSent,
)
from vmd.ipc.messages.control import PassFiles
from vmd.ipc.messages.opener import OpenedFile
from vmd.ipc.messages.shared import Live
from vmd.ipc.messages.vm import (
    CancelTransfer,
    DisksLetGo,
    EndSend,
    HeaderSent,
    LetDisksGo,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendOn,
    SendUndone,
    SendVm,
    StopMode,
    StopVm,
    TakenBack,
    VmFailed,
)
from vmd.parent.opening import Opened
from vmd.parent.vm import At, State, Vm
from vmd.record import Record

UNUSED: Any = None
LLADDR = bytes.fromhex("fee1ba000001")
SHARED = OpenedFile(what="disk /disk", file=FileId(device=1, inode=2))


@pytest.fixture
def parent() -> Iterator[Any]:
    """Yield a parent with a running VM `a` of vm.conf."""
    made = Parent()
    made.vms.add(VmConfig(name="a", owner=Owner(uid=5), memory_bytes=64 << 20), from_config=True)
    running(made)
    yield made
    close_vms(made.vms)


def step(parent: Any, what: Step, name: str = "a", *, client: int = CLIENT, **more: Any) -> list[Record]:  # noqa: ANN401
    """Take a step.  Return the messages to vmm."""
    parent.vmm.sent.clear()
    parent.transfers.migrations.serve_step(MigrationStep(name=name, step=what, **more), ROOT, envelope(client))
    sent: list[Record] = list(parent.vmm.sent)
    return sent


def answers(parent: Any) -> list[Record]:  # noqa: ANN401
    """Return the answers to the client since the last call."""
    found = [message for client, message in parent.answers if client == CLIENT and not isinstance(message, PassFiles)]
    parent.answers.clear()
    return found


def migrate_away(parent: Any, *, until: str, locks_travel: bool = False) -> Vm:  # noqa: ANN401
    """Migrate VM `a` to another host, up to the step `until`."""
    room = parent.transfers.migrations
    vm: Vm = parent.vms.get(0, "a")
    at = MigrationAt(vmid=vm.vmid, name="a", paused=False)
    room.serve_migrate(MigrateRequest(name="a"), ROOT, envelope())
    assert parent.vmm.sent == [SendVm(vmid=vm.vmid, keep=False, one_shot=False, two_way=True, live=Live())]
    assert vm.state is State.SENDING
    if until == "begun":
        return vm
    room.on_header_sent(HeaderSent(vmid=vm.vmid), UNUSED)
    assert answers(parent) == [at]
    if until == "asked":
        return vm
    assert step(parent, Step.GO_ON, locks_travel=locks_travel) == [SendOn(vmid=vm.vmid)]
    if until == "memory":
        return vm
    parent.transfers.on_send_done(SendDone(vmid=vm.vmid, sent_bytes=100, stopped_ns=1), UNUSED)
    assert answers(parent) == [at]
    if until == "complete":
        return vm
    assert step(parent, Step.COMMIT) == [LetDisksGo(vmid=vm.vmid)]
    if until == "committing":
        return vm
    room.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
    assert answers(parent) == [at]
    parent.vmm.sent.clear()
    return vm


def report_undone(parent: Any, vm: Vm, outcome: TakenBack = TakenBack.DONE, text: str = "") -> None:  # noqa: ANN401
    """Let the VM process report whether it has its disks back."""
    parent.transfers.migrations.on_undone(SendUndone(vmid=vm.vmid, outcome=outcome, text=text), UNUSED)


# --- source ----------------------------------------------------------------------------------------------------------


def test_vm_ends_here_when_it_runs_there(parent: Any) -> None:  # noqa: ANN401
    """The client gets its answer when the VM has ended here."""
    vm = migrate_away(parent, until="committed")

    assert step(parent, Step.DONE) == [EndSend(vmid=vm.vmid, sent=True)]
    assert (vm.state, answers(parent)) == (State.STOPPING, [])
    exited(parent, vm, 0, "sent")

    (sent,) = answers(parent)
    assert isinstance(sent, VmSent)
    assert (sent.sent_bytes, sent.downtime_ms > 0) == (100, True)


@pytest.mark.parametrize("until", ["begun", "asked", "memory"])
@pytest.mark.parametrize("how", ["the client leaves", "the client says so"])
def test_cut_before_all_is_written(parent: Any, until: str, how: str) -> None:  # noqa: ANN401
    """The VM continues, and is not in doubt."""
    vm = migrate_away(parent, until=until)
    parent.vmm.sent.clear()
    if how == "the client leaves":
        leave(parent, CLIENT)
    else:
        step(parent, Step.BACK, in_doubt=True, text="there: no")
    assert set(parent.vmm.sent) == {CancelTransfer(vmid=vm.vmid)}

    parent.transfers.on_send_done(SendDone(vmid=vm.vmid, sent_bytes=1, text="sending was interrupted"), UNUSED)

    assert vm.state is State.RUNNING
    text = "vm a was not migrated, and is as before: there: no"
    assert set(answers(parent)) == (set() if how == "the client leaves" else {Failed(code=errno.EIO, text=text)})


@pytest.mark.parametrize("until", ["memory", "complete", "committing"])
def test_client_that_leaves_before_the_answer_to_the_commit(parent: Any, until: str) -> None:  # noqa: ANN401
    """The client cannot have told the target to run the VM, so the VM is not in doubt."""
    vm = migrate_away(parent, until=until)
    leave(parent, CLIENT)
    parent.vmm.sent.clear()
    if until == "memory":  # it was too late to cancel
        parent.transfers.on_send_done(SendDone(vmid=vm.vmid, sent_bytes=100), UNUSED)
    elif until == "committing":
        parent.transfers.migrations.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
    if until != "complete":
        assert parent.vmm.sent == [EndSend(vmid=vm.vmid, sent=False)]
    states = [vm.state]

    report_undone(parent, vm)

    assert [*states, vm.state] == [State.SENDING, State.RUNNING]


def test_target_that_never_ran_it(parent: Any) -> None:  # noqa: ANN401
    """The client says so with BACK.  The VM continues here, and the client gets the reason."""
    vm = migrate_away(parent, until="committed")
    assert step(parent, Step.BACK, text="there: no room") == [EndSend(vmid=vm.vmid, sent=False)]

    report_undone(parent, vm)

    assert vm.state is State.RUNNING
    text = "vm a was not migrated, and continues here: there: no room"
    assert answers(parent) == [Failed(code=errno.EIO, text=text)]


@pytest.mark.parametrize("how", ["the client leaves", "the client does not know"])
@pytest.mark.parametrize("locks_travel", [False, True])
def test_in_doubt(parent: Any, how: str, locks_travel: bool) -> None:  # noqa: ANN401
    """It is unknown whether the VM runs there, so it is paused.  Its disks are tried if their locks can tell."""
    vm = migrate_away(parent, until="committed", locks_travel=locks_travel)
    if how == "the client leaves":
        leave(parent, CLIENT)
    else:
        step(parent, Step.BACK, in_doubt=True, text="there: gone")
        (failed,) = answers(parent)
        assert isinstance(failed, Failed)
        assert failed.code == VMD_IN_DOUBT

    assert vm.state is State.IN_DOUBT
    assert vm.text.startswith("it may run elsewhere: ")
    assert parent.vmm.sent == []
    assert len(parent.later) == locks_travel
    for message in (PauseRequest(name="a", paused=True), PauseRequest(name="a", paused=False)):
        if not (locks_travel and not message.paused):
            with pytest.raises(OperatorError, match="in doubt"):
                parent.transfers.serve_pause(message, ROOT, Envelope(message, OTHER, 0, {}))
    with pytest.raises(OperatorError, match="in doubt"):
        vm.begin_stop(force=False)


def vm_in_doubt(parent: Any, *, locks_travel: bool) -> Vm:  # noqa: ANN401
    """Return a VM in doubt."""
    vm = migrate_away(parent, until="committed", locks_travel=locks_travel)
    leave(parent, CLIENT)
    assert vm.state is State.IN_DOUBT
    return vm


def test_doubt_ends_with_the_disks(parent: Any, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: ANN401
    """They are tried at growing intervals, and this is logged once.  With unchanged disks the VM continues."""
    vm = vm_in_doubt(parent, locks_travel=True)
    for _ in range(3):
        parent.later.pop()()
        assert parent.vmm.sent.pop() == EndSend(vmid=vm.vmid, sent=False)
        report_undone(parent, vm, TakenBack.IN_USE, "disk0 is in use by somebody else")
        assert vm.state is State.IN_DOUBT
    assert parent.delays_s == [5, 10, 20, 40]
    assert capfd.readouterr().err.count("stays in doubt: disk0 is in use by somebody else") == 1
    parent.later.pop()()

    report_undone(parent, vm)

    assert (vm.state, vm.text, vm.sending) == (State.RUNNING, "", None)


def test_doubt_does_not_end_with_disks_that_were_written_to(parent: Any) -> None:  # noqa: ANN401
    """The VM has run elsewhere.  The disks are not tried again."""
    vm = vm_in_doubt(parent, locks_travel=True)
    parent.later.pop()()
    report_undone(parent, vm, TakenBack.CHANGED, "disk0 has been written to")

    assert vm.state is State.IN_DOUBT
    assert vm.text == "it has run elsewhere: disk0 has been written to"
    assert parent.later == []


def test_doubt_ends_by_a_forced_unpause(parent: Any) -> None:  # noqa: ANN401
    """The disks must be free.  The client waits for that."""
    vm = vm_in_doubt(parent, locks_travel=False)
    parent.answers.clear()
    message = PauseRequest(name="a", paused=False, force=True)
    for outcome in (TakenBack.IN_USE, TakenBack.DONE):
        parent.vmm.sent.clear()
        parent.transfers.serve_pause(message, ROOT, Envelope(message, CLIENT, 0, {}))
        assert parent.vmm.sent == [EndSend(vmid=vm.vmid, sent=False)]
        report_undone(parent, vm, outcome, "disk0 is in use by somebody else" if outcome else "")

    assert answers(parent) == [
        Failed(code=errno.EBUSY, text="vm a stays in doubt: disk0 is in use by somebody else"),
        VmPaused(vmid=vm.vmid, name="a", paused=False),
    ]
    assert vm.state is State.RUNNING


def test_steps_in_the_wrong_order(parent: Any) -> None:  # noqa: ANN401
    """They are refused, and so are steps of another client.  No process is told."""
    vm = migrate_away(parent, until="asked")
    for what in (Step.COMMIT, Step.DONE):
        with pytest.raises(OperatorError, match="is not the next step"):
            step(parent, what)
    with pytest.raises(OperatorError, match="is not being migrated by this client"):
        step(parent, Step.GO_ON, client=OTHER)
    assert parent.vmm.sent == []
    assert vm.state is State.SENDING


def test_disks_that_cannot_be_let_go(parent: Any) -> None:  # noqa: ANN401
    """The VM continues here."""
    vm = migrate_away(parent, until="committing")
    parent.transfers.migrations.on_disks_let_go(DisksLetGo(vmid=vm.vmid, text="disk0: no"), UNUSED)
    report_undone(parent, vm)
    text = "vm a was not migrated, and continues here: disk0: no"
    assert answers(parent) == [Failed(code=errno.EIO, text=text)]


# --- target ----------------------------------------------------------------------------------------------------------


def migrate_here(parent: Any, *, until: str, force: bool = False, opened: Opened | None = None) -> Vm:  # noqa: ANN401
    """Migrate VM `b` to this host, up to the step `until`.  Its disk is still in use by the sender."""
    room = parent.transfers.migrations
    room.serve_migrate_in(MigrateInRequest(name="b", force=force), ROOT, envelope())
    vm: Vm = parent.vms.get(0, "b")
    assert parent.vmm.sent == [ReceiveVm(vmid=vm.vmid, name="b", verbosity=0)]
    answers(parent)
    parent.vmm.sent.clear()
    if opened is None:
        opened = Opened()
        opened.in_use = (SHARED,)
    parent.disks.found = opened
    nics = (NicConfig(lladdr=LLADDR),)
    config = VmConfig(name="b", memory_bytes=64 << 20, disks=(DiskConfig(path="/disk"),), nics=nics)
    parent.transfers.on_received_header(ReceivedHeader(vmid=vm.vmid, config=config, one_shot=False), UNUSED)
    parent.disks.found = None
    if until == "asked":
        return vm
    assert answers(parent) == [MigrationAt(vmid=vm.vmid, name="b", locks_travel=True)]
    assert step(parent, Step.GO_ON, "b") == [ReceiveMemory(vmid=vm.vmid)]
    if until == "memory":
        return vm
    parent.transfers.on_received_machine(ReceivedMachine(vmid=vm.vmid), UNUSED)
    assert answers(parent) == [MigrationAt(vmid=vm.vmid, name="b")]
    assert parent.vmm.sent == [ReceiveMemory(vmid=vm.vmid)]  # the sender still has its disks
    return vm


@pytest.mark.parametrize("paused", [False, True])
def test_vm_runs_here_after_the_commit(parent: Any, paused: bool) -> None:  # noqa: ANN401
    """It opens its disks at the commit, and runs unless it was paused."""
    vm = migrate_here(parent, until="complete")
    (resume,) = step(parent, Step.COMMIT, "b", paused=paused)
    assert isinstance(resume, ResumeReceived)
    assert resume.paused is paused

    report_running(parent, vm, paused=paused)

    (received,) = answers(parent)
    assert isinstance(received, VmReceived)
    assert vm.state is (State.PAUSED if paused else State.RUNNING)


@pytest.mark.parametrize("until", ["asked", "memory", "complete"])
def test_sender_that_leaves_before_the_commit(parent: Any, until: str) -> None:  # noqa: ANN401
    """The VM ends here, even if everything was read, because it continues at the sender."""
    vm = migrate_here(parent, until=until)
    parent.vmm.sent.clear()
    leave(parent, CLIENT)
    assert set(parent.vmm.sent) == {StopVm(vmid=vm.vmid, mode=StopMode.KILL)}


def test_sender_that_leaves_after_the_commit(parent: Any) -> None:  # noqa: ANN401
    """The VM runs here, because it cannot continue at the sender."""
    vm = migrate_here(parent, until="complete")
    step(parent, Step.COMMIT, "b")
    parent.vmm.sent.clear()
    leave(parent, CLIENT)
    assert parent.vmm.sent == []
    report_running(parent, vm, paused=False)
    assert vm.state is State.RUNNING


def test_disks_that_cannot_be_opened(parent: Any) -> None:  # noqa: ANN401
    """The VM ends here at once, and certainly never ran, so it can continue at the sender."""
    vm = migrate_here(parent, until="complete")
    parent.disks.trouble = [InUse("disk /disk", SHARED.file)]
    assert step(parent, Step.COMMIT, "b") == [StopVm(vmid=vm.vmid, mode=StopMode.KILL)]
    exited(parent, vm, vm.code, vm.receiving.failure if vm.receiving else "")
    assert answers(parent) == [Failed(code=errno.EBUSY, text="vm b: disk /disk: is in use by another process")]


@pytest.mark.parametrize("said", [False, True])
def test_process_that_ends_after_it_was_told_to_run(parent: Any, said: bool) -> None:  # noqa: ANN401
    """The VM may have run, unless its process has reported that it could not."""
    vm = migrate_here(parent, until="complete")
    step(parent, Step.COMMIT, "b")
    assert vm.receiving is not None
    vm.receiving.resumed = True  # the network does this when it sends the message
    if said:
        parent.life.on_failed(VmFailed(vmid=vm.vmid, code=errno.EINVAL, text="no"), UNUSED)
    exited(parent, vm, errno.EIO, "no")
    assert answers(parent) == [Failed(code=errno.EIO if said else VMD_IN_DOUBT, text="vm b: no")]


def test_disk_that_is_not_in_use(parent: Any) -> None:  # noqa: ANN401
    """Then the sender does not use it, and the migration is refused."""
    opened = Opened()
    opened.unused = ("/disk",)
    vm = migrate_here(parent, until="asked", opened=opened)
    assert vm.receiving is not None
    assert vm.receiving.failure.startswith("disk /disk: it is not in use, so it is not the sender's; ")


def test_disk_that_is_not_in_use_by_force(parent: Any) -> None:  # noqa: ANN401
    """The migration is allowed, but without the evidence of locks."""
    opened = Opened()
    opened.unused = ("/disk",)
    vm = migrate_here(parent, until="asked", opened=opened, force=True)
    assert answers(parent) == [MigrationAt(vmid=vm.vmid, name="b", locks_travel=False)]


def test_disk_of_another_vm_of_this_host(parent: Any) -> None:  # noqa: ANN401
    """That VM is not the one that is sent."""
    parent.vms.get(0, "a").files = {"disk /disk": SHARED.file.key}
    vm = migrate_here(parent, until="asked")
    assert vm.receiving is not None
    assert vm.receiving.failure == "disk /disk: is in use by vm a"


def test_address_of_another_vm_of_this_host(parent: Any) -> None:  # noqa: ANN401
    """Both would be on one network.  But the sender may be this daemon itself."""
    other = parent.vms.get(0, "a")
    other.config = other.config.replace(nics=(NicConfig(lladdr=LLADDR),))
    vm = migrate_here(parent, until="asked")
    assert vm.receiving is not None
    assert vm.receiving.failure == "interface 0 has the Ethernet address fe:e1:ba:00:00:01, which vm a has here"


def test_migration_within_one_daemon(parent: Any) -> None:  # noqa: ANN401
    """The VM that is sent has the disk here, under its other name."""
    migrate_away(parent, until="asked").files = {"disk /disk": SHARED.file.key}
    parent.vmm.sent.clear()
    migrate_here(parent, until="complete")


# --- what does not happen, and what is said --------------------------------------------------------------------------

ALL = frozenset(Step)


@pytest.mark.parametrize(
    ("until", "next_steps"),
    [
        ("begun", {Step.BACK}),
        ("asked", {Step.BACK, Step.GO_ON}),
        ("memory", {Step.BACK}),
        ("complete", {Step.BACK, Step.COMMIT}),
        ("committing", {Step.BACK}),
        ("committed", {Step.BACK, Step.DONE}),
    ],
)
def test_only_the_next_step_is_taken(parent: Any, until: str, next_steps: set[Step]) -> None:  # noqa: ANN401
    """At the source each other step is refused.  After BACK nothing is the next step any more, not even BACK."""
    migrate_away(parent, until=until)
    for what in ALL - next_steps:
        with pytest.raises(OperatorError, match="is not the next step"):
            step(parent, what)
    if until in ("complete", "committed"):
        step(parent, Step.BACK)
        for what in ALL:
            with pytest.raises(OperatorError, match="is not the next step"):
                step(parent, what)
        assert parent.vmm.sent == []


@pytest.mark.parametrize(
    ("until", "next_steps"), [("memory", {Step.BACK}), ("complete", {Step.BACK, Step.COMMIT}), ("commit", set())]
)
def test_only_the_next_step_is_taken_at_the_target(
    parent: Any, until: str, next_steps: set[Step]  # noqa: ANN401
) -> None:
    """After the commit the target cannot go back, because the guest may have run."""
    vm = migrate_here(parent, until=until)
    parent.disks.slow = True
    if until == "commit":
        step(parent, Step.COMMIT, "b")
    for what in ALL - next_steps:
        with pytest.raises(OperatorError, match=f"vm b: `{what.name.lower().replace('_', ' ')}` is not the next step"):
            step(parent, what, "b")
    if Step.BACK in next_steps:
        assert step(parent, Step.BACK, "b", text="no") == [StopVm(vmid=vm.vmid, mode=StopMode.KILL)]
        assert vm.receiving is not None
        assert (vm.receiving.failure, vm.code) == ("no", errno.ECANCELED)


def test_a_vm_that_is_not_migrated_any_more(parent: Any) -> None:  # noqa: ANN401
    """Its client has no more steps to take, and a later migration by another client is not disturbed."""
    vm = migrate_away(parent, until="committed")
    step(parent, Step.BACK)
    with pytest.raises(OperatorError, match="vm a: `done` is not the next step"):
        step(parent, Step.DONE)
    report_undone(parent, vm)
    with pytest.raises(OperatorError, match="vm a is not being migrated by this client"):
        step(parent, Step.DONE)
    parent.transfers.migrations.serve_migrate(MigrateRequest(name="a"), ROOT, envelope(OTHER))
    parent.vmm.sent.clear()
    leave(parent, CLIENT)
    assert (vm.state, parent.vmm.sent) == (State.SENDING, [])


def test_a_step_for_a_vm_that_is_stopping(parent: Any) -> None:  # noqa: ANN401
    """The error names the state."""
    vm = migrate_away(parent, until="complete")
    vm.begin_stop(force=True)
    with pytest.raises(OperatorError, match="vm a is stopping"):
        step(parent, Step.COMMIT)


def test_messages_that_come_twice_or_too_early(parent: Any) -> None:  # noqa: ANN401
    """A VM's process may say anything.  The client is told nothing that is not true, and no step is taken."""
    room = parent.transfers.migrations
    vm = parent.vms.get(0, "a")

    def say_all(but: str = "") -> None:
        if but != "header":
            room.on_header_sent(HeaderSent(vmid=vm.vmid), UNUSED)
        if but != "disks":
            room.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
        report_undone(parent, vm)

    say_all()
    for until in ("asked", "committed"):
        parent.vmm.sent.clear()
        vm = migrate_away(parent, until=until)
        parent.answers.clear()
        say_all()
        assert (answers(parent), vm.state) == ([], State.SENDING)
        vm.stay()
        parent.clients.gone(CLIENT)
        parent.vmm.sent.clear()
    assert (vm.state, parent.vmm.sent) == (State.RUNNING, [])


def test_the_time_for_which_the_guest_stood(parent: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """From its pause here to the client's DONE, in whole milliseconds.  The log has it, too."""
    vm = migrate_away(parent, until="memory")
    done = SendDone(vmid=vm.vmid, sent_bytes=100, rounds=3, stopped_ns=1_000_000_000)
    parent.transfers.on_send_done(done, UNUSED)
    step(parent, Step.COMMIT)
    parent.transfers.migrations.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
    answers(parent)
    monkeypatch.setattr("vmd.parent.migrations.time.monotonic_ns", lambda: 1_042_999_999)
    step(parent, Step.DONE)
    exited(parent, vm, 0, "sent")
    assert answers(parent) == [VmSent(vmid=vm.vmid, name="a", sent_bytes=100, rounds=3, downtime_ms=42)]


def test_a_guest_that_was_paused_before(parent: Any) -> None:  # noqa: ANN401
    """The target learns that it must not run it.  Here it stays paused, too."""
    vm = parent.vms.get(0, "a")
    vm.pause_changed(paused=True)
    vm = migrate_away(parent, until="committing")
    parent.transfers.migrations.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
    assert answers(parent) == [MigrationAt(vmid=vm.vmid, name="a", paused=True)]
    step(parent, Step.BACK)
    report_undone(parent, vm)
    assert vm.state is State.PAUSED


def test_the_log_of_a_migration(parent: Any, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: ANN401
    """It has the beginning, the doubt with what ends it, and the end."""
    vm = migrate_away(parent, until="committed")
    step(parent, Step.BACK, text="there: no")
    report_undone(parent, vm)
    said = capfd.readouterr().err
    assert "a: migrating vm 1\n" in said
    assert "vm a: not migrated: there: no\n" in said
    assert "it has its disks again" not in said
    answers(parent)
    words = {False: "`vmctl unpause -f` continues it here", True: "it continues when its disks are free"}
    for travel, then in words.items():
        parent.vmm.sent.clear()
        vm = migrate_away(parent, until="committed", locks_travel=travel)
        step(parent, Step.BACK, in_doubt=True, text="there: gone")
        doubt = f"in doubt, and paused: it may run elsewhere: there: gone; {then}"
        assert answers(parent) == [Failed(code=VMD_IN_DOUBT, text=f"vm a is {doubt}")]
        assert f"vm a: {doubt}\n" in capfd.readouterr().err
        parent.transfers.migrations.unpause(vm, OTHER, force=True)
        report_undone(parent, vm)
        said = capfd.readouterr().err
        assert "vm a: continues here: it has its disks again, and they are unchanged\n" in said
        assert "not migrated" not in said
        leave(parent, CLIENT)
        parent.answers.clear()


def test_the_attempts_do_not_become_rarer_than_one_a_minute(parent: Any) -> None:  # noqa: ANN401
    """There may be many: the other host may be away for days."""
    vm = vm_in_doubt(parent, locks_travel=True)
    for _ in range(20):
        parent.later.pop()()
        report_undone(parent, vm, TakenBack.IN_USE, "in use")
    assert parent.delays_s == [5, 10, 20, 40, *[60] * 17]


def test_disks_that_cannot_be_taken_back_at_once(parent: Any) -> None:  # noqa: ANN401
    """A VM that the client has sent back is in doubt then, and says both reasons."""
    vm = migrate_away(parent, until="committed", locks_travel=True)
    step(parent, Step.BACK, text="there: no")
    report_undone(parent, vm, TakenBack.IN_USE, "disk0 is in use")
    assert (vm.state, vm.text) == (State.IN_DOUBT, "it may run elsewhere: there: no; disk0 is in use")
    (failed,) = answers(parent)
    assert isinstance(failed, Failed)
    assert failed.code == VMD_IN_DOUBT


def test_a_timer_of_an_earlier_doubt(parent: Any) -> None:  # noqa: ANN401
    """It does not take back the disks of a VM that is not in doubt any more, or whose disks are being taken back."""
    vm = vm_in_doubt(parent, locks_travel=True)
    (timer,) = parent.later
    timer()
    parent.vmm.sent.clear()
    timer()
    assert parent.vmm.sent == []
    report_undone(parent, vm)
    timer()
    assert parent.vmm.sent == []


@pytest.mark.parametrize(
    ("in_use", "disks", "travel"),
    [((SHARED,), 1, True), ((SHARED,), 2, False), ((SHARED, SHARED), 2, True), ((), 0, False)],
)
def test_all_locks_must_travel(
    parent: Any, in_use: tuple[OpenedFile, ...], disks: int, travel: bool  # noqa: ANN401
) -> None:
    """Each disk must be seen in use by the sender; without a disk nothing shows whether the VM runs."""
    opened = Opened()
    opened.in_use = in_use
    room = parent.transfers.migrations
    room.serve_migrate_in(MigrateInRequest(name="b"), ROOT, envelope())
    vm = parent.vms.get(0, "b")
    answers(parent)
    parent.disks.found = opened
    config = VmConfig(name="b", disks=tuple(DiskConfig(path=f"/{number}") for number in range(disks)))
    parent.transfers.on_received_header(ReceivedHeader(vmid=vm.vmid, config=config, one_shot=False), UNUSED)
    assert answers(parent) == [MigrationAt(vmid=vm.vmid, name="b", locks_travel=travel)]


@pytest.mark.parametrize(
    ("at", "state", "sent"),
    [
        (At.ASKED, State.SENDING, [CancelTransfer(vmid=1)]),
        (At.MEMORY, State.SENDING, [CancelTransfer(vmid=1)]),
        (At.COMPLETE, State.SENDING, [EndSend(vmid=1, sent=False)]),
        (At.COMMITTING, State.SENDING, []),
        (At.COMMITTED, State.IN_DOUBT, []),
    ],
)
def test_a_migration_of_an_earlier_parent(
    parent: Any, at: At, state: State, sent: list[Record]  # noqa: ANN401
) -> None:
    """Its client is gone.  Only a VM whose disks were released is in doubt."""
    vm = migrate_away(parent, until="begun")
    parent.vmm.sent.clear()
    parent.transfers.migrations.abandon(vm, at)
    assert (vm.state, parent.vmm.sent) == (state, sent)
    assert vm.sending is not None
    assert vm.sending.abandoned == "the client that migrated it has left"


def test_each_step_is_kept_for_the_next_parent(parent: Any) -> None:  # noqa: ANN401
    """It must know whether the disks were released."""
    vm = migrate_away(parent, until="complete")
    for what in (Step.COMMIT, Step.BACK):
        parent.core.touched.clear()
        step(parent, what)
        parent.transfers.migrations.on_disks_let_go(DisksLetGo(vmid=vm.vmid), UNUSED)
        assert parent.core.touched == {vm.vmid}


def test_addresses_of_vms_that_do_not_run(parent: Any) -> None:  # noqa: ANN401
    """They do not count, nor do other addresses.  Those of the running machine count."""
    other = parent.vms.get(0, "a")
    other.config = other.config.replace(nics=(NicConfig(lladdr=LLADDR),))
    other.running_config = other.config.replace(nics=(NicConfig(lladdr=LLADDR[:5] + b"\7"),))
    migrate_here(parent, until="complete")
    other.running_config = other.config
    other.restore_state(State.STOPPED)
    parent.vms.remove(parent.vms.get(0, "b"))
    parent.clients.gone(CLIENT)
    parent.vmm.sent.clear()
    migrate_here(parent, until="complete")
