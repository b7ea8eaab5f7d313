"""VM-MIB: its variables, their order, and the successor of each."""

import time

import pytest

from vmd.agentx import mib, pdu
from vmd.agentx.notifications import OF_STATE, affected
from vmd.agentx.pdu import SearchRange
from vmd.ipc.figures import CdromFigures, DiskFigures, NicFigures, VcpuFigures
from vmd.ipc.messages.agentx import AgentxLink, AgentxVm, AgentxVms
from vmd.parent.agentx import CRASHED, MIGRATING
from vmd.parent.vm import State

GIB = 1 << 30
ABOUT = AgentxVms(began_ns=0, changed_ns=50_000_000)


def vm(vmid: int, **changes: object) -> AgentxVm:
    """Return a VM with one of each device."""
    made = AgentxVm(
        vmid=vmid,
        name=f"vm{vmid}",
        state="running",
        enabled=True,
        persistent=True,
        started_s=int(time.time()) - 100,
        memory_bytes=2 * GIB,
        guest_bytes=GIB + 1,
        cpu_ns=5_000_999,
        vcpus=(VcpuFigures(index=0, cpu_ns=1_000_999), VcpuFigures(index=1, cpu_ns=2_000_000)),
        disks=(
            DiskFigures(index=0, path="/a.qcow2", size_bytes=3 * GIB, read_requests=4, read_bytes=5, read_ns=6000,
                        write_requests=7, write_bytes=8, write_ns=9000),
            DiskFigures(index=1, path="/dev/sda"),
        ),
        cdrom=CdromFigures(index=0, size_bytes=1 << 20),
        nics=(NicFigures(index=0, tap="vmtap0", switch="lan", lladdr=b"\x02\0\0\0\0\1"),),
        formats=("qcow2", "raw"),
        disc="/install.iso",
        links=(AgentxLink(tap=3, parent=2),),
    )  # fmt: skip
    return made.replace(**changes)


def view(*vms: AgentxVm) -> mib.View:
    """Return the variables of these VMs."""
    return mib.View(vms, ABOUT, per_vm=True, bulk=False)


def column(shown: mib.View, entry: tuple[int, ...], number: int) -> dict[tuple[int, ...], object]:
    """Return a column of a table, by index."""
    start = (*entry, number)
    return {
        name[len(start) :]: value
        for name, (_, value) in zip(shown.names, shown.values, strict=True)
        if name[: len(start)] == start
    }


def test_variables_are_in_order() -> None:
    """Otherwise lookups would fail.  Each variable exists once."""
    shown = view(vm(300), vm(2), vm(1))
    assert shown.names == sorted(set(shown.names))
    assert all(name[: len(mib.OBJECTS)] == mib.OBJECTS for name in shown.names)


def test_a_vm() -> None:
    """RFC 7666, vmTable."""
    shown = view(vm(7))
    row = {number: column(shown, mib.VM_ENTRY, number)[(7,)] for number in range(2, 18)}
    assert 10000 <= row.pop(16) < 20000  # type: ignore[operator]
    assert row == {
        2: b"vm7", 3: b"", 4: b"", 5: 1, 6: 4, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 1 << 20, 13: 1024, 14: -1, 15: 2048,
        17: 5000,
    }  # fmt: skip


def test_its_devices() -> None:
    """RFC 7666, the tables of vCPUs, storage and interfaces.  An index begins with 1."""
    shown = view(vm(7))
    assert column(shown, mib.CPU_ENTRY, 2) == {(7, 1): 1000, (7, 2): 2000}
    storage = {number: tuple(column(shown, mib.STORAGE_ENTRY, number).values()) for number in range(3, 19)}
    assert list(column(shown, mib.STORAGE_ENTRY, 3)) == [(7, 1), (7, 2), (7, mib.DRIVE_INDEX)]
    assert storage == {
        3: (0, 0, 0), 4: (5, 3, 4), 5: (b"qcow2", b"raw", b"raw"), 6: (b"/a.qcow2", b"/dev/sda", b"/install.iso"),
        7: (2, 2, 3), 8: (3, 3, 4), 9: (b"disk", b"disk", b"cdrom"), 10: (1 << 20,) * 3, 11: (3072, -1, 1),
        12: (-1,) * 3, 13: (4, 0, 0), 14: (7, 0, 0), 15: (5, 0, 0), 16: (8, 0, 0), 17: (6, 0, 0), 18: (9, 0, 0),
    }  # fmt: skip
    network = {number: column(shown, mib.NETWORK_ENTRY, number)[(7, 1)] for number in range(2, 6)}
    assert network == {2: 3, 3: 2, 4: b"virtio-net", 5: b"\x02\0\0\0\0\1"}


@pytest.mark.parametrize("state", [*(state.value for state in State), CRASHED, MIGRATING])
def test_every_state_has_its_number(state: str) -> None:
    """A new state needs a number, too.  `unknown` is only for a VM that may run at another host."""
    assert (mib.oper_state(state) == mib.UNKNOWN) == (state == State.IN_DOUBT.value)
    shown = view(vm(1, state=state))
    assert column(shown, mib.VM_ENTRY, 6) == {(1,): mib.OPER_STATES[state]}
    assert column(shown, mib.VM_ENTRY, 5)[(1,)] in (1, 2, 3, 4)


def test_missing_variables() -> None:
    """An object without this instance differs from a missing object."""
    shown = view(vm(1))
    assert shown.get((*mib.NAME, 1)).value == b"vm1"
    assert shown.get((*mib.NAME, 2)).kind == pdu.NO_SUCH_INSTANCE
    assert shown.get((*mib.OBJECTS, 2)).kind == pdu.NO_SUCH_OBJECT
    assert shown.get((*mib.OBJECTS, 2, 1)).kind == pdu.NO_SUCH_INSTANCE
    assert shown.get((*mib.VM_ENTRY, 99, 1)).kind == pdu.NO_SUCH_OBJECT
    assert shown.get(()).kind == pdu.NO_SUCH_OBJECT


def test_a_walk_finds_everything_once() -> None:
    """The walk uses GetNext, or GetBulk of any size."""
    shown = view(vm(1), vm(2))
    for size in (1, 2, 7, 1000):
        found, start = [], mib.VM_MIB
        while True:
            binds = shown.bulk([SearchRange(start=start)], 0, size, 2000)
            found += [each.name for each in binds if each.kind != pdu.END_OF_MIB_VIEW]
            if binds[-1].kind == pdu.END_OF_MIB_VIEW:
                break
            start = binds[-1].name
        assert found == shown.names


def test_ranges() -> None:
    """The start is found if it is included.  The end is never found."""
    shown = view(vm(1))
    first, second = shown.names[:2]
    assert shown.following(SearchRange(start=first)).name == second
    assert shown.following(SearchRange(start=first, include=True)).name == first
    assert shown.following(SearchRange(start=first, end=second)).kind == pdu.END_OF_MIB_VIEW
    assert shown.following(SearchRange(start=first, end=second)).name == first
    assert shown.following(SearchRange(start=shown.names[-1])).kind == pdu.END_OF_MIB_VIEW


def test_bulk() -> None:
    """RFC 2741, 7.2.3.3: non-repeated variables come first, then rounds.  The number of variables is bounded."""
    shown = view(vm(1), vm(2))
    number, name, state = (*mib.OBJECTS, 2), mib.NAME, mib.OPER_STATE
    ranges = [SearchRange(start=each) for each in (number, name, state)]
    found = [each.name for each in shown.bulk(ranges, 1, 2, 2000)]
    assert found == [(*number, 0), (*name, 1), (*state, 1), (*name, 2), (*state, 2)]
    assert [each.name for each in shown.bulk(ranges, 9, 5, 2000)] == [(*number, 0), (*name, 1), (*state, 1)]
    assert shown.bulk(ranges, 3, 5, 2000) == shown.bulk(ranges, 3, 0, 2000)
    assert len(shown.bulk(ranges, 0, 65535, 10)) == 9
    assert len(shown.bulk(ranges, 0, 65535, 1)) == 3  # one round, even if the bound is smaller
    ended = shown.bulk([SearchRange(start=shown.names[-1])], 0, 5, 2000)
    assert [each.kind for each in ended] == [pdu.END_OF_MIB_VIEW]


def test_the_hypervisor() -> None:
    """The number of VMs is right for none and for 200."""
    assert view().get((*mib.OBJECTS, 2, 0)).value == 0
    shown = view(*(vm(number) for number in range(1, 201)))
    assert shown.get((*mib.OBJECTS, 2, 0)).value == 200
    assert shown.get((*mib.OBJECTS, 3, 0)).value == 5
    assert len(shown.names) == 8 + 200 * (16 + 2 + 3 * 16 + 4)


def test_texts_and_numbers_have_limits() -> None:
    """Longer texts are cut between two characters, and sizes do not become negative."""
    assert mib.text("\N{SNOWMAN}" * 100) == ("\N{SNOWMAN}" * 85).encode()
    assert mib.text("\udcff") == b"?"
    assert mib.units(1 << 62) == mib.INT_MAX
    assert mib.ticks(5, 0) == 0
    assert mib.ticks(0, (0xFFFFFFFF + 2) * mib.TICK_NS) == 1


def test_affected_vms() -> None:
    """VirtualMachineList: VM 1 has the highest bit of the first byte."""
    assert affected({1}) == b"\x80"
    assert affected({8, 9}) == b"\x01\x80"
    assert affected({1 << 40}) == bytes(1 << 13)


def test_notifications_have_a_state() -> None:
    """Each of these notifications belongs to one state.  Those for suspended (6) and deleted (10) VMs do not."""
    assert sorted(OF_STATE.values()) == [1, 2, 3, 4, 5, 7, 8, 9]


@pytest.mark.parametrize("switches", [(True, False), (False, True)])
def test_the_switches_of_notifications(switches: tuple[bool, bool]) -> None:
    """Each variable tells its own switch, as a TruthValue."""
    per_vm, bulk = switches
    shown = mib.View([], ABOUT, per_vm=per_vm, bulk=bulk)
    found = [dict(zip(shown.names, shown.values, strict=True))[name][1] for name in (mib.PER_VM, mib.BULK)]
    assert found == [1 if switch else 2 for switch in switches]
