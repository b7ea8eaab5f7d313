"""Saves the state of a paused machine as records, and restores it into another machine (docs/formats.md 4).

Saving reads a paused `Machine`.  Restoring fills a machine that was just built from the same configuration and has not
run.  That machine is then paused, as the saved one was.  `unpack` checks the type of each field.  The meaning of the
values is checked here, by the chips and by KVM.  The text of a ValueError completes "the stream is not usable: ...".
"""

import struct

from vmd.config import rules
from vmd.config.model import MAX_SEED_BYTES, without_secrets
from vmd.ipc.imsg import Form, encode, unpack
from vmd.ipc.messages.vm import ReceivedHeader
from vmd.kvmapi import abi
from vmd.record import Part, Record
from vmd.units import PAGE
from vmd.vm import stream, stream_v2
from vmd.vm.boot.kind import FIRMWARE_MAX
from vmd.vm.clocks import MSR_TSC, MSR_TSC_DEADLINE, Clocks, VcpuClocks
from vmd.vm.header import CpuidLeaf, DeviceHead, Header, read_header
from vmd.vm.kinds import kinds
from vmd.vm.slots import LAYOUT, LAYOUT_FIRST, with_serials
from vmd.vm.virtio import VirtioState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmd.kvmapi.vcpu import Vcpu
    from vmd.vm.machine import Machine
    from vmd.vm.pci import BusState, FunctionState
    from vmd.vm.slots import Slot

MSR = struct.Struct("<IQ")
PICS = (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC)

# CPUID registers (leaf, sub-leaf, register) with feature bits: the guest may use each feature of the sender's host.
FEATURES = (
    (1, 0, "ecx"), (1, 0, "edx"), (7, 0, "ebx"), (7, 0, "ecx"), (7, 0, "edx"), (7, 1, "eax"), (7, 1, "edx"),
    (0xD, 0, "eax"), (0xD, 1, "eax"), (0x80000001, 0, "ecx"), (0x80000001, 0, "edx"), (0x80000007, 0, "edx"),
    (0x80000008, 0, "ebx"), (0x40000001, 0, "eax"),
)  # fmt: skip
OSXSAVE = 1 << 27  # leaf 1, ECX: no feature, but a copy of a bit of the guest's CR4
TSC_TOLERANCE_PPM = 250  # KVM's default tolerance; beyond it the guest's clock would be wrong

# The largest MachineState that is accepted: several times what the MSRs and APIC of a vCPU, and the rest, take.
VCPU_BYTES_MAX = 32 << 10
OTHER_BYTES_MAX = 256 << 10


class Register(Record):
    """One value of a chip: a number, or bytes."""

    name: str
    number: int
    data: bytes | None = None


class ChipState(Part):
    """One chip's registers."""

    name: str
    registers: tuple[Register, ...]


class PciFunctionState(Part):
    """One function's configuration space and MSI-X table."""

    slot: int
    config: bytes
    msix: bytes


class VcpuState(Part):
    """One vCPU, in the kernel's structures."""

    mp_state: int
    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    debugregs: bytes
    events: bytes
    lapic: bytes
    msrs: bytes  # index u32, value u64, each
    tsc: int
    tsc_deadline: int | None  # None: the processor has no TSC deadline timer


class MachineState(Part):
    """Everything except memory.  The parts in this record have versions of their own."""

    vcpus: tuple[VcpuState, ...]
    irqchips: tuple[bytes, ...]
    pit: bytes
    kvmclock_ns: int
    chips: tuple[ChipState, ...]
    pci_address: int
    functions: tuple[PciFunctionState, ...]
    virtio: tuple[VirtioState, ...]
    vmmci: ChipState
    seed: bytes = b""  # the content of the seed, if the machine has one


def read_machine(version: int, raw: bytes) -> MachineState:
    """Return the machine in a stream of this version.  Raises ValueError."""
    return unpack(MachineState, raw, stream_v2.machine) if version == stream_v2.VERSION else unpack(MachineState, raw)


def bytes_max(header: Header) -> int:
    """Return how many bytes of state are accepted from a machine with this header.

    There is a bound because an unpacked list takes much more memory than its bytes.
    """
    seed_max = MAX_SEED_BYTES if header.config.seed is not None else 0
    return header.config.vcpus * (VCPU_BYTES_MAX + header.xsave_bytes) + OTHER_BYTES_MAX + seed_max


# --- saving --------------------------------------------------------------------------------------------------


def header(machine: "Machine", *, one_shot: bool) -> Header:
    """Return the header of a machine."""
    return Header(
        config=without_secrets(with_serials(machine.config, machine.slots)),
        one_shot=one_shot,
        firmware_bytes=machine.firmware_bytes,
        touched_bytes=machine.memory.resident_bytes(),
        xsave_bytes=machine.vcpus[0].vcpu.xsave_bytes,
        tsc_khz=machine.tsc_khz,
        cpuid=tuple(
            CpuidLeaf(**{field: getattr(leaf, field) for field in CpuidLeaf.fields}) for leaf in machine.cpuid
        ),
        devices=tuple(
            DeviceHead(
                kind=slot.kind.name,
                slot=slot.number,
                features=function.server.features,
                layout=slot.layout,
                serial=slot.serial,
            )
            for slot, function in zip(machine.slots, machine.virtio, strict=True)
        ),
    )


def save(machine: "Machine", clocks: Clocks) -> MachineState:
    """Return the state of a paused machine."""
    pci = machine.pci.state()
    return MachineState(
        vcpus=tuple(
            _save_vcpu(machine, thread.vcpu, each)
            for thread, each in zip(machine.vcpus, clocks.vcpus, strict=True)
        ),
        irqchips=tuple(bytes(machine.kvm.get_irqchip(chip)) for chip in PICS),
        pit=clocks.pit,
        kvmclock_ns=clocks.kvmclock_ns,
        chips=tuple(_save_chip(name, chip.state()) for name, chip in machine.chips().items()),
        pci_address=pci["address"],
        functions=tuple(PciFunctionState(**function) for function in pci["functions"]),
        virtio=tuple(function.save() for function in machine.virtio),
        vmmci=_save_chip("vmmci", machine.vmmci.save()),
        seed=machine.seed,
    )


def _save_vcpu(machine: "Machine", vcpu: "Vcpu", clocks: VcpuClocks) -> VcpuState:
    mp_state = vcpu.get_mp_state()  # first: in this call KVM delivers a pending INIT or SIPI
    msrs = vcpu.get_msrs(index for index in machine.msr_indices if index not in (MSR_TSC, MSR_TSC_DEADLINE))
    return VcpuState(
        mp_state=mp_state,
        regs=bytes(vcpu.get_regs()),
        sregs=bytes(vcpu.get_sregs()),
        xsave=vcpu.get_xsave(),
        xcrs=bytes(vcpu.get_xcrs()),
        debugregs=bytes(vcpu.get_debugregs()),
        events=bytes(vcpu.get_vcpu_events()),
        lapic=clocks.put_into(vcpu.get_lapic()),
        msrs=b"".join(MSR.pack(index, value) for index, value in msrs.items()),
        tsc=clocks.tsc,
        tsc_deadline=clocks.deadline,
    )


def _save_chip(name: str, state: "dict[str, Any]") -> ChipState:
    return ChipState(
        name=name,
        registers=tuple(
            Register(name=key, number=0, data=value)
            if isinstance(value, bytes)
            else Register(name=key, number=value)
            for key, value in state.items()
        ),
    )


# --- restoring -----------------------------------------------------------------------------------------------


def check_sent_header(header_raw: bytes, machine: "Machine") -> Header:
    """Return this machine's header as a receiver on a host like this one reads it.

    Raises ValueError if that receiver would refuse the header.
    """
    if len(header_raw) > stream.HEADER_MAX:
        raise ValueError(f"the header has {len(header_raw)} bytes, at most {stream.HEADER_MAX} are accepted")
    sent = read_header(stream.VERSION, header_raw)
    check_header(sent)
    rules.check_vm(sent.config)
    encode(ReceivedHeader(vmid=0, config=sent.config, one_shot=sent.one_shot), form=Form.NAMED)
    check_processor(sent, machine.cpuid)
    return sent


def check_sent(header_raw: bytes, state_raw: bytes, machine: "Machine") -> None:
    """Raise ValueError unless a receiver on a host like this one would accept this header and state.

    The sender checks its own stream before it writes it.  A receiver that found the mistake might have the only copy of
    the machine, and could not use it.
    """
    sent_header = check_sent_header(header_raw, machine)
    if len(state_raw) > bytes_max(sent_header):
        raise ValueError(f"the state has {len(state_raw)} bytes, at most {bytes_max(sent_header)} are accepted")
    sent_state = read_machine(stream.VERSION, state_raw)
    check(machine, sent_state, sent_header.devices)
    like = machine.chips()
    for saved, chip in zip(sent_state.chips, machine.spare_chips().values(), strict=True):
        _restore_chip(saved, like[saved.name].state(), chip.restore)


def check_header(sent: Header) -> None:
    """Raise ValueError if no host could have a machine with this header."""
    config, firmware = sent.config, sent.firmware_bytes
    if rules.memory_bytes(config.memory_bytes) % PAGE:
        raise ValueError(f"it has {config.memory_bytes} bytes of memory")
    rules.vcpus(config.vcpus)
    if not 0 <= firmware <= FIRMWARE_MAX or firmware % PAGE:
        raise ValueError(f"it has firmware of {firmware} bytes")
    check_devices(sent)


def check_devices(sent: Header) -> None:
    """Raise ValueError unless the devices are the ones that the configuration asks for."""
    found, wanted = [device.kind for device in sent.devices], [kind.name for kind in kinds(sent.config)]
    if found != wanted:
        raise ValueError(f"its {len(found)} devices are not the {len(wanted)} of its configuration")
    for device in sent.devices:
        if not LAYOUT_FIRST <= device.layout <= LAYOUT:
            raise ValueError(
                f"the device in PCI slot {device.slot} has layout {device.layout},"
                f" where this vmd has {LAYOUT_FIRST} to {LAYOUT}"
            )
        if device.serial and not rules.valid_serial(device.serial.decode("latin-1")):
            raise ValueError(f"the disk in PCI slot {device.slot} has serial number {device.serial!r}")


def as_sent(slots: "Sequence[Slot]", devices: tuple[DeviceHead, ...]) -> "list[Slot]":
    """Return the slots with the layouts and serial numbers that the guest has seen at the sender."""
    return [
        slot.replace(layout=device.layout, serial=device.serial) for slot, device in zip(slots, devices, strict=True)
    ]


def check_processor(sent: Header, machine_cpuid: "list[abi.kvm_cpuid_entry2]") -> None:
    """Raise ValueError unless a guest that ran on the sender's processor can go on with ours."""
    host_leaves = {(leaf.function, leaf.index): leaf for leaf in machine_cpuid}
    sent_leaves = {(leaf.function, leaf.index): leaf for leaf in sent.cpuid}
    host, sender = host_leaves.get((0, 0)), sent_leaves.get((0, 0))
    if host is None or sender is None or (host.ebx, host.ecx, host.edx) != (sender.ebx, sender.ecx, sender.edx):
        raise ValueError("it comes from a host with a processor of another vendor")
    for function, index, register in FEATURES:
        sent_bits = getattr(sent_leaves.get((function, index)), register, 0)
        host_bits = getattr(host_leaves.get((function, index)), register, 0)
        missing = sent_bits & ~host_bits & ~(OSXSAVE if (function, register) == (1, "ecx") else 0)
        if missing:
            raise ValueError(
                "it needs processor features that this host lacks:"
                f" cpuid {function:#x}.{index} {register} {missing:#x}"
            )


def check_tsc(sent_khz: int, host_khz: int) -> None:
    """Raise ValueError if the two time stamp counters differ so much that the guest's clock would be wrong here."""
    if abs(sent_khz - host_khz) * 1_000_000 > TSC_TOLERANCE_PPM * host_khz:
        raise ValueError(f"its time stamp counter runs at {sent_khz} kHz, this host's at {host_khz} kHz")


def cpuid_of(sent: Header) -> "list[abi.kvm_cpuid_entry2]":
    """Return the sender's CPUID table, from which vCPUs are built."""
    return [
        abi.kvm_cpuid_entry2(*(getattr(leaf, field) & 0xFFFFFFFF for field in CpuidLeaf.fields))
        for leaf in sent.cpuid
    ]


def check(machine: "Machine", state: MachineState, devices: tuple[DeviceHead, ...]) -> None:
    """Raise ValueError unless this is the state of a machine like this one, with these devices.

    The registers of chips are checked when the chips are restored.  KVM checks its own structures.
    """
    if len(state.vcpus) != len(machine.vcpus):
        raise ValueError(f"the state has {len(state.vcpus)} vcpus, not {len(machine.vcpus)}")
    if len(state.irqchips) != len(PICS):
        raise ValueError(f"the state has {len(state.irqchips)} interrupt controllers, not {len(PICS)}")
    if not len(state.virtio) == len(machine.virtio) == len(devices):
        raise ValueError(f"the state has {len(state.virtio)} virtio devices, not {len(machine.virtio)}")
    if [chip.name for chip in state.chips] != list(machine.chips()):
        raise ValueError("the state has other chips than this machine")
    machine.pci.check(_bus(state))
    for function, saved, device in zip(machine.virtio, state.virtio, devices, strict=True):
        function.check_registers(saved, device.features)
    for chip_id, raw in zip(PICS, state.irqchips, strict=True):
        if raw[:4] != chip_id.to_bytes(4, "little"):
            raise ValueError(f"the state of interrupt controller {chip_id} has another number")
    for vcpu in state.vcpus:
        if len(vcpu.msrs) % MSR.size:
            raise ValueError(f"the state of a vcpu has {len(vcpu.msrs)} bytes of MSRs")


def _bus(state: MachineState) -> "BusState":
    functions: list[FunctionState] = [
        {"slot": each.slot, "config": each.config, "msix": each.msix} for each in state.functions
    ]
    return {"address": state.pci_address, "functions": functions}


def restore(machine: "Machine", state: MachineState, devices: tuple[DeviceHead, ...]) -> Clocks:
    """Give a machine the state of another one with these devices.  Return the clocks with which it will go on.

    Raises ValueError, or OSError from KVM, if the state does not fit this machine.
    """
    check(machine, state, devices)
    chips = machine.chips()
    for chip in state.chips:
        _restore_chip(chip, chips[chip.name].state(), chips[chip.name].restore)
    for function in machine.virtio:
        function.detach_interrupts()  # an interrupt enabled below must not reach controllers that are not restored yet
    machine.pci.restore(_bus(state))
    for function, saved in zip(machine.virtio, state.virtio, strict=True):
        function.restore_registers(saved)
    _restore_chip(state.vmmci, machine.vmmci.save(), machine.vmmci.restore_registers)
    # After the chips: restoring a chip moves its interrupt line, which changes the controllers.
    for raw in state.irqchips:
        machine.kvm.set_irqchip(raw)
    for thread, vcpu in zip(machine.vcpus, state.vcpus, strict=True):
        _restore_vcpu(thread.vcpu, vcpu, machine.msr_indices)
    clocks = Clocks(
        [VcpuClocks.in_page(vcpu.tsc, vcpu.tsc_deadline, vcpu.lapic) for vcpu in state.vcpus],
        state.kvmclock_ns,
        state.pit,
    )
    clocks.hold(machine.kvm, [thread.vcpu for thread in machine.vcpus])
    return clocks


def _restore_vcpu(vcpu: "Vcpu", state: VcpuState, msr_indices: list[int]) -> None:
    known = frozenset(msr_indices)
    vcpu.set_sregs(state.sregs)
    vcpu.set_xcrs(state.xcrs)  # before xsave: XCR0 says which parts of it are used
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)  # after sregs, which have the base address of the APIC
    # An MSR that KVM here does not know or does not accept is left out: this KVM could not act on its value.
    vcpu.set_msrs({index: value for index, value in MSR.iter_unpack(state.msrs) if index in known})
    vcpu.set_regs(state.regs)
    vcpu.set_vcpu_events(state.events)  # after regs: setting them cancels a pending exception
    vcpu.set_mp_state(state.mp_state)


def _restore_chip(
    state: ChipState, like: "dict[str, Any]", restore_chip: "Callable[[dict[str, Any]], None]"
) -> None:
    """Restore a chip.  `like` is its present state, which has the names and types of its registers.

    A register that the chip no longer has is ignored.  A register of another type is a ValueError.  The chip itself
    decides which registers may be missing.
    """
    registers = {
        each.name: each.number if each.data is None else each.data for each in state.registers if each.name in like
    }
    for name, value in registers.items():
        if isinstance(value, bytes) != isinstance(like[name], bytes):
            raise ValueError(f"register {name} of {state.name} has another type")
    try:
        restore_chip(registers)
    except KeyError as error:
        raise ValueError(f"{state.name} has no register {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"an impossible state of {state.name}: {error}") from error
