"""States, ids and permissions of VMs, without any process."""

import errno
import grp
import pwd
import re
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.backlog import Backlog
from vmd.config.model import Owner, VmConfig
from vmd.errors import VMD_VM_STOP_INVALID, InUse, OperatorError, PeerError
from vmd.fileid import FileId
from vmd.ipc.messages.clients import Caller
from vmd.memfile import memory_file
from vmd.parent import vm as vms
from vmd.parent.access import in_group, may_control, owner_text
from vmd.parent.limits import RESTART_WINDOW_S, RestartLimit
from vmd.parent.resources import Pty
from vmd.parent.vm import State, Vm
from vmd.parent.vmtable import VmTable

NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def table() -> VmTable:
    """Return a table with two VMs."""
    table = VmTable()
    table.add(VmConfig(name="a"), from_config=True)
    table.add(VmConfig(name="b", owner=Owner(uid=7)), from_config=True)
    return table


def test_ids_stay_with_name_and_owner(table: VmTable) -> None:
    """A VM that is added again has its earlier id.  The same name with another owner gets a new one (cat. 4.1)."""
    old = table.get(0, "b")
    table.remove(old)
    assert table.add(VmConfig(name="b", owner=Owner(uid=7)), from_config=True).vmid == old.vmid == 2
    table.remove(table.get(2))
    assert table.add(VmConfig(name="b", owner=Owner(uid=8)), from_config=True).vmid == 3
    assert [vm.vmid for vm in table] == [1, 3]


def test_a_name_that_looks_like_an_id(table: VmTable) -> None:
    """It is a name first, if a VM has it.  A request with only an id finds the id."""
    table.add(VmConfig(name="1"), from_config=True)
    assert (table.get(1, "1").name, table.get(1).name, table.get(2, "2").name) == ("1", "a", "b")
    assert (table.get(3, "1").name, table.get(0, "1").name) == ("1", "1")
    table.add(VmConfig(name="02"), from_config=True)
    assert table.get(2, "02").name == "02"
    with pytest.raises(OperatorError, match="vm 9 not found"):
        table.get(9, "9")


def test_numbering_starts_again_only_without_vms(table: VmTable) -> None:
    """`reset vms` restarts the counter (cat. 2.8)."""
    table.forget_ids()
    assert table.add(VmConfig(name="c"), from_config=True).vmid == 3
    for vm in list(table):
        table.remove(vm)
    table.forget_ids()
    assert table.add(VmConfig(name="c"), from_config=True).vmid == 1


def test_nothing_is_left_open_of_a_vm_that_is_removed(table: VmTable) -> None:
    """Neither its console nor its files."""
    before = open_descriptors()
    vm = table.get(1)
    vm.pty, vm.backlog = Pty(), Backlog.create(0)
    vm.kept = {"boot": memory_file("kernel")}
    table.remove(vm)
    assert open_descriptors() == before


def test_a_template_is_a_vm_that_will_stay(table: VmTable) -> None:
    """`vmctl reset` has killed another one, and it will be replaced."""
    vm = table.get(2)
    assert table.template("b") is vm.config
    vm.resetting = True
    assert table.template("b") is None
    assert table.template("c") is None


def test_only_a_vm_with_a_process_speaks(table: VmTable) -> None:
    """A message about another one breaks the protocol."""
    vm = table.get(1)
    for vmid in (1, 99):
        with pytest.raises(PeerError, match=f"speaks of vm {vmid}, which does not run"):
            table.living(vmid)
    vm.begin_start(0)
    assert table.living(1) is vm


def test_the_vm_that_has_a_file(table: VmTable) -> None:
    """It is named if it has a process.  The file of the VM itself is in use by another program."""
    a, b = table.get(1), table.get(2)
    error = InUse("disk /d", FileId(device=1, inode=2))
    a.files = b.files = {"disk /d": error.file.key}
    assert table.holder(error, None) is error
    b.begin_start(0)
    assert "vm b" in str(table.holder(error, None))
    assert "vm b" in str(table.holder(error, a))
    assert table.holder(error, b) is error
    b.files = {"disk /d": (1, 3)}
    assert table.holder(error, a) is error


def test_names_are_unique_and_asked_for_by_name_or_id(table: VmTable) -> None:
    """The error names a VM that does not exist."""
    with pytest.raises(OperatorError, match="vm a already exists"):
        table.add(VmConfig(name="a"), from_config=False)
    assert table.get(1).name == "a"
    with pytest.raises(OperatorError, match="vm 99 not found"):
        table.get(99)
    with pytest.raises(OperatorError, match="vm zz not found"):
        table.get(0, "zz")


def test_transitions(table: VmTable) -> None:
    """A VM starts once, stops once, and may be killed while it stops."""
    vm = table.get(1)
    with pytest.raises(OperatorError) as refused:
        vm.begin_stop(force=True)
    assert refused.value.number == VMD_VM_STOP_INVALID
    vm.begin_start(0)
    with pytest.raises(OperatorError) as refused:
        vm.begin_start(0)
    assert refused.value.number == errno.EALREADY
    assert str(refused.value) == "vm a is starting"
    vm.begin_stop(force=False)
    vm.begin_run(4711)
    assert vm.state is State.STOPPING  # it was told to stop before it ran
    with pytest.raises(OperatorError) as refused:
        vm.begin_stop(force=False)
    assert refused.value.number == errno.EALREADY
    vm.begin_stop(force=True)
    vm.ended("gone")
    assert (vm.state, vm.pid, vm.text) == (State.STOPPED, 0, "gone")


def test_only_a_vm_changes_its_state() -> None:
    """Its methods check the present state.  No other module of the parent bypasses them."""
    folder = Path(vms.__file__).parent
    around = [path.name for path in folder.glob("*.py") if re.search(r"\._(state|enter)\b", path.read_text())]
    assert around == ["vm.py"]
    assert Vm.state.fset is None  # type: ignore[attr-defined]


def test_a_running_vm_belongs_to_the_user_who_started_it(table: VmTable) -> None:
    """When it has ended, it belongs to its owner again (cat. 3.3)."""
    vm: Vm = table.get(2)
    vm.begin_start(0)
    vm.uid = 1234
    vm.ended("")
    assert vm.uid == 7


@pytest.mark.parametrize(
    ("times_s", "allowed"),
    [
        ([0, 1, 2, 3], [True, True, False]),
        ([0, 1, 2, 2 + RESTART_WINDOW_S + 1, 10], [True, True, True, True]),
        ([0, 7, 14, 21], [True, True, True]),
        ([0, 1, 2, 2 + RESTART_WINDOW_S], [True, True, True]),
        ([0, 1, 2, 1.9 + RESTART_WINDOW_S], [True, True, False]),
    ],
)
def test_restart_limit(monkeypatch: pytest.MonkeyPatch, times_s: list[float], allowed: list[bool]) -> None:
    """The third quick restart in a row is refused.  A pause resets the count (cat. 4.3)."""
    clock = iter(times_s)
    monkeypatch.setattr("vmd.parent.limits.time.monotonic", lambda: next(clock))
    limit = RestartLimit()
    limit.started_by_user()
    assert [limit.may_restart() for _ in times_s[1:]] == allowed


def test_the_users_who_may_control_a_vm() -> None:
    """Root, the owner, and members of the owning group may do so (cat. 4.8)."""
    root, owner, nobody = (Caller(uid=uid, gid=uid, pid=1) for uid in (0, 5, NOBODY.pw_uid))
    assert may_control(root, 5, None)
    assert may_control(owner, 5, None)
    assert not may_control(nobody, 5, None)
    assert may_control(nobody, 5, NOBODY.pw_gid)
    assert not may_control(nobody, 5, 0)


def test_group_membership_of_unknown_ids() -> None:
    """Ids without a name are in no group."""
    unused = max(user.pw_uid for user in pwd.getpwall() if user.pw_uid < 60000) + 1
    assert not in_group(unused, 0)
    assert not in_group(0, max(group.gr_gid for group in grp.getgrall() if group.gr_gid < 60000) + 1)


def test_owner_is_shown_by_name() -> None:
    """Ids without a name are shown as numbers."""
    assert owner_text(0, None) == "root"
    assert owner_text(0, 0) == "root:root"
    assert owner_text(4_000_000_000, 4_000_000_001) == "4000000000:4000000001"
