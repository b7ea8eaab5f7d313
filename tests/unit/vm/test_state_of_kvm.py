"""The state that KVM has of a machine is saved and restored: registers of vCPUs and interrupt controllers."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import saved
from tests.support.saved import MIB
from vmd.config.model import MAX_SEED_BYTES, SeedConfig, VmConfig
from vmd.errors import OperatorError
from vmd.ipc.imsg import pack
from vmd.vm import state, stream
from vmd.vm.boot.kind import FIRMWARE_MAX
from vmd.vm.clocks import MSR_TSC, MSR_TSC_DEADLINE, Clocks, VcpuClocks
from vmd.vm.header import DeviceHead
from vmd.vm.state import MSR, PICS, MachineState

LSTAR, KERNEL_GS_BASE, PAT, GONE = 0xC0000082, 0xC0000102, 0x277, 0x4B564D99
MSRS = {LSTAR: 0xFFFFFFFF_81000000, KERNEL_GS_BASE: 0x7FFF_12345678, PAT: 0x0007_0406_0007_0406}
CLOCKS = (MSR_TSC, MSR_TSC_DEADLINE)
# KVM needs this order: see the comments in `_restore_vcpu`.
SET = ["sregs", "xcrs", "xsave", "debugregs", "lapic", "msrs", "regs", "vcpu_events", "mp_state"]
PAGE_OF_APIC = bytes(range(256)) * 4


class Vcpu:
    """A vCPU.  The content of each group of registers is its name."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls: list[str] = []
        self.values: dict[str, object] = {}
        self.msrs = {**MSRS, **dict.fromkeys(CLOCKS, 77)}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return a method for any other `get_` or `set_`, which records its calls."""
        what = name[4:]
        self.__dict__[name] = (
            (lambda: self.get(what)) if name.startswith("get_") else lambda value: self.set(what, value)
        )
        return self.__dict__[name]

    def get(self, what: str) -> object:
        """Return a group of registers."""
        self.calls.append(what)
        return (
            self.number + 1
            if what == "mp_state"
            else PAGE_OF_APIC
            if what == "lapic"
            else f"{what}{self.number}".encode()
        )

    def set(self, what: str, value: object) -> None:
        """Keep a group of registers."""
        self.calls.append(what)
        self.values[what] = value

    def get_msrs(self, indices: object) -> dict[int, int]:
        """Return MSRs."""
        self.calls.append("msrs")
        return {index: self.msrs[index] for index in cast("tuple[int, ...]", indices)}


class Kvm:
    """The interrupt controllers."""

    def __init__(self) -> None:
        self.set_to: list[bytes] = []

    def get_irqchip(self, number: int) -> bytes:
        """Return the state of one, which begins with its number."""
        return number.to_bytes(4, "little") + b"pic"

    def set_irqchip(self, raw: bytes) -> None:
        """Record the state of one."""
        self.set_to.append(raw)


class Pci:
    """A PCI bus with a fixed state."""

    def __init__(self) -> None:
        self.restored: list[object] = []

    def state(self) -> dict[str, Any]:
        """Return a state."""
        return {"address": 0x80001234, "functions": [{"slot": 3, "config": b"c" * 256, "msix": b"m"}]}

    def check(self, bus: object) -> None:
        """Accept every state."""

    def restore(self, bus: object) -> None:
        """Record the state."""
        self.restored.append(bus)


def machine(vcpus: int = 2, **changes: object) -> Any:  # noqa: ANN401
    """Return the parts of a machine that saving and restoring need."""
    vmmci = SimpleNamespace(save=lambda: {"status": 1}, restore_registers=lambda _registers: None)
    made = {
        "kvm": Kvm(), "pci": Pci(), "vcpus": [SimpleNamespace(vcpu=Vcpu(number)) for number in range(vcpus)],
        "chips": dict, "virtio": [], "vmmci": vmmci, "seed": b"seed", "msr_indices": [*MSRS, *CLOCKS],
    }  # fmt: skip
    return SimpleNamespace(**{**made, **changes})


def clocks(vcpus: int = 2) -> Clocks:
    """Return the clocks of a stopped machine."""
    return Clocks([VcpuClocks(1000 + number, 2000 + number, 9, 8) for number in range(vcpus)], 3000, b"pit")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Clocks]:
    """Return the list that collects the clocks that were held."""
    found: list[Clocks] = []
    monkeypatch.setattr(Clocks, "hold", lambda self, _kvm, _vcpus: found.append(self))
    return found


def saved_machine() -> MachineState:
    """Return the saved state of a machine with two vCPUs."""
    return state.save(machine(), clocks())


def test_the_state_of_vcpus_is_saved() -> None:
    """Each group of registers has its own field.  Clocks have the values of the stop.  All other MSRs are saved."""
    kept = saved_machine()

    for number, vcpu in enumerate(kept.vcpus):
        names = ("regs", "sregs", "xsave", "xcrs", "debugregs")
        assert [getattr(vcpu, name) for name in names] == [f"{name}{number}".encode() for name in names]
        assert (vcpu.mp_state, vcpu.events) == (number + 1, f"vcpu_events{number}".encode())
        assert dict(MSR.iter_unpack(vcpu.msrs)) == MSRS
        assert (vcpu.tsc, vcpu.tsc_deadline) == (1000 + number, 2000 + number)
        assert VcpuClocks.in_page(0, 0, vcpu.lapic).initial == 9
    assert kept.irqchips == tuple(chip.to_bytes(4, "little") + b"pic" for chip in PICS)
    assert (kept.pit, kept.kvmclock_ns, kept.seed, kept.pci_address) == (b"pit", 3000, b"seed", 0x80001234)
    assert [(each.slot, each.config, each.msix) for each in kept.functions] == [(3, b"c" * 256, b"m")]


def test_a_pending_start_is_delivered_before_registers_are_read() -> None:
    """KVM delivers it when mp_state is read, so that is read first."""
    made = machine()
    state.save(made, clocks())

    assert made.vcpus[0].vcpu.calls[0] == "mp_state"


def test_the_state_of_vcpus_is_restored(held: list[Clocks]) -> None:
    """Registers are set in the order that KVM needs, without the MSRs that this host does not have."""
    kept = saved_machine()
    unknown = MSR.pack(GONE, 1)
    kept = kept.replace(vcpus=tuple(vcpu.replace(msrs=unknown + vcpu.msrs) for vcpu in kept.vcpus))
    made = machine()

    state.restore(made, kept, ())

    for number, thread in enumerate(made.vcpus):
        vcpu, was = thread.vcpu, kept.vcpus[number]
        assert vcpu.calls == SET
        assert vcpu.values.pop("msrs") == MSRS
        assert vcpu.values == {
            "mp_state": was.mp_state, "regs": was.regs, "sregs": was.sregs, "xsave": was.xsave, "xcrs": was.xcrs,
            "debugregs": was.debugregs, "vcpu_events": was.events, "lapic": was.lapic,
        }  # fmt: skip
    assert made.kvm.set_to == list(kept.irqchips)
    assert [bus["address"] for bus in made.pci.restored] == [0x80001234]
    (going_on,) = held
    assert (going_on.kvmclock_ns, going_on.pit) == (3000, b"pit")
    assert [(each.tsc, each.deadline, each.initial, each.current) for each in going_on.vcpus] == [
        (1000, 2000, 9, 8), (1001, 2001, 9, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vcpus": ()}, "the state has 0 vcpus, not 2"),
        ({"vcpus": saved_machine().vcpus * 2}, "the state has 4 vcpus, not 2"),
        ({"irqchips": saved_machine().irqchips[:2]}, "the state has 2 interrupt controllers, not 3"),
        ({"irqchips": saved_machine().irqchips * 2}, "the state has 6 interrupt controllers, not 3"),
        ({"irqchips": saved_machine().irqchips[::-1]}, "the state of interrupt controller 0 has another number"),
        ({"virtio": (saved.device(),)}, "the state has 1 virtio devices, not 0"),
        ({"chips": (saved.chip("uart", lcr=3),)}, "the state has other chips than this machine"),
        (
            {"vcpus": tuple(vcpu.replace(msrs=vcpu.msrs[:-1]) for vcpu in saved_machine().vcpus)},
            "the state of a vcpu has 35 bytes of MSRs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_of_another_machine_is_refused(held: list[Clocks], changes: dict[str, object], sentence: str) -> None:
    """The error names the difference.  KVM gets no part of the state."""
    made = machine()

    with pytest.raises(ValueError, match="the state") as refused:
        state.restore(made, saved_machine().replace(**changes), ())

    assert str(refused.value) == sentence
    assert [thread.vcpu.calls for thread in made.vcpus] == [[], []]
    assert (made.kvm.set_to, made.pci.restored, held) == ([], [], [])


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"firmware_bytes": 0}, ""),
        ({"firmware_bytes": 4096}, ""),
        ({"firmware_bytes": FIRMWARE_MAX}, ""),
        ({"firmware_bytes": FIRMWARE_MAX + 4096}, f"it has firmware of {FIRMWARE_MAX + 4096} bytes"),
        ({"firmware_bytes": -4096}, "it has firmware of -4096 bytes"),
        ({"firmware_bytes": 4097}, "it has firmware of 4097 bytes"),
        ({"memory_bytes": 8 * MIB + 4096}, ""),
        ({"memory_bytes": 8 * MIB + 1}, f"it has {8 * MIB + 1} bytes of memory"),
        ({"memory_bytes": 0}, "memory"),
        ({"vcpus": 0}, "cpu"),
        ({"vcpus": 1 << 20}, "cpu"),
        ({"devices": ()}, "its 0 devices are not the 2 of its configuration"),
    ],
    ids=str,
)
def test_only_headers_of_possible_machines_are_accepted(changes: dict[str, object], sentence: str) -> None:
    """It has whole pages, firmware that fits below 4 GiB, vCPUs, and the devices of the configuration."""
    theirs = saved.header()
    inner = {name: value for name, value in changes.items() if name in ("memory_bytes", "vcpus")}
    outer = {name: value for name, value in changes.items() if name not in inner}
    theirs = theirs.replace(config=theirs.config.replace(**inner), **outer)

    if sentence:
        with pytest.raises(ValueError, match=sentence):
            state.check_header(theirs)
    else:
        state.check_header(theirs)


def test_the_largest_state_that_is_accepted() -> None:
    """The limit grows with the vCPUs, their extended registers, and a seed."""
    one = saved.header()
    seed = one.replace(config=one.config.replace(seed=SeedConfig()))
    two = one.replace(config=one.config.replace(vcpus=2), xsave_bytes=100)

    assert state.bytes_max(one) == state.VCPU_BYTES_MAX + one.xsave_bytes + state.OTHER_BYTES_MAX
    assert state.bytes_max(two) == 2 * (state.VCPU_BYTES_MAX + 100) + state.OTHER_BYTES_MAX
    assert state.bytes_max(seed) == state.bytes_max(one) + MAX_SEED_BYTES


def test_the_header_describes_the_machine() -> None:
    """The header comes first in a stream, so that a receiver can refuse the machine early."""
    made = machine(
        config=VmConfig(name="sent", memory_bytes=8 * MIB),
        slots=[],
        firmware_bytes=65536,
        memory=SimpleNamespace(resident_bytes=lambda: 12345),
        tsc_khz=saved.TSC_KHZ,
        cpuid=saved.entries(saved.CPUID),
    )
    for thread in made.vcpus:
        thread.vcpu.xsave_bytes = 4096

    said = state.header(made, one_shot=True)

    assert (said.one_shot, said.firmware_bytes, said.touched_bytes, said.xsave_bytes) == (True, 65536, 12345, 4096)
    assert (said.tsc_khz, said.cpuid, said.devices) == (saved.TSC_KHZ, saved.CPUID, ())
    assert said.config == made.config


class Sent:
    """A machine whose stream is checked before it is written."""

    def __init__(self, **changes: object) -> None:
        self.header = saved.header(config=VmConfig(name="sent", memory_bytes=8 * MIB), devices=RNG).replace(**changes)
        self.machine = machine(cpuid=saved.entries(saved.CPUID), virtio=[SimpleNamespace(check_registers=self.check)])
        self.checked: list[object] = []
        self.machine.spare_chips = dict

    def check(self, _saved: object, features: int) -> None:
        """Record the features of the device."""
        self.checked.append(features)


RNG = (DeviceHead(kind="rng", slot=1, features=5),)


def test_a_stream_is_checked_by_its_sender() -> None:
    """The sender checks like a receiver: the header, the processor, the size of the state, and its content."""
    sent = Sent()
    kept = saved_machine().replace(virtio=(saved.device(),))
    raw = pack(kept)

    state.check_sent(pack(sent.header), raw, sent.machine)
    assert sent.checked == [5]

    with pytest.raises(ValueError, match="bytes, at most"):
        state.check_sent(pack(sent.header), raw.ljust(state.bytes_max(sent.header) + 1), sent.machine)
    fewer = kept.replace(vcpus=kept.vcpus[:1])
    with pytest.raises(ValueError, match="vcpus, not 2"):
        state.check_sent(pack(sent.header), pack(fewer), sent.machine)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": VmConfig(name="-", memory_bytes=8 * MIB)}, "name"),
        ({"firmware_bytes": 1}, "firmware"),
        ({"cpuid": (*saved.CPUID[:1], saved.leaf(1, ecx=0x1F))}, "processor features"),
    ],
    ids=["name", "firmware", "processor"],
)
def test_a_header_that_no_receiver_accepts_is_found_by_the_sender(changes: dict[str, object], sentence: str) -> None:
    """It is found before the machine is given up."""
    sent = Sent(**changes)

    with pytest.raises((ValueError, OperatorError), match=sentence):
        state.check_sent_header(pack(sent.header), sent.machine)
    with pytest.raises(ValueError, match="the header has"):
        state.check_sent_header(b"x" * (stream.HEADER_MAX + 1), sent.machine)
