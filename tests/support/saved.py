"""Small valid records of a sent machine, which tests change."""

from vmd.config.model import DiskConfig, VmConfig
from vmd.kvmapi import abi
from vmd.vm.header import CpuidLeaf, DeviceHead, Header
from vmd.vm.state import ChipState, MachineState, PciFunctionState, Register, VcpuState
from vmd.vm.virtio import QueueState, VirtioState

MIB = 1 << 20
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # "GenuineIntel" in EBX, ECX, EDX
TSC_KHZ = 2_500_000


def leaf(function: int, index: int = 0, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidLeaf:
    """Return an entry of a CPUID table."""
    return CpuidLeaf(function=function, index=index, flags=0, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


CPUID = (leaf(0, eax=0xD, ebx=INTEL[0], ecx=INTEL[2], edx=INTEL[1]), leaf(1, ecx=0xF, edx=0xF), leaf(7, ebx=0xF0))


def entries(leaves: tuple[CpuidLeaf, ...]) -> list[abi.kvm_cpuid_entry2]:
    """Return a CPUID table in KVM's form."""
    return [abi.kvm_cpuid_entry2(*(getattr(each, name) for name in CpuidLeaf.fields)) for each in leaves]


def header(**changes: object) -> Header:
    """Return the header of a VM with 8 MiB and a disk."""
    made = Header(
        config=VmConfig(name="sent", memory_bytes=8 * MIB, disks=(DiskConfig(path="/disk"),)),
        one_shot=True,
        firmware_bytes=0,
        touched_bytes=MIB,
        xsave_bytes=4096,
        tsc_khz=TSC_KHZ,
        cpuid=CPUID,
        devices=(DeviceHead(kind="rng", slot=1, features=0), DeviceHead(kind="blk", slot=2, features=0)),
    )
    return made.replace(**changes)


def queue(**changes: object) -> QueueState:
    """Return a running queue."""
    made = QueueState(
        size=64, enabled=True, desc=0x10000, avail=0x11000, used=0x12000, pfn=0, vector=0xFFFF, next_avail=7,
        next_used=7, called=False, unseen=False,
    )  # fmt: skip
    return made.replace(**changes)


def device(queues: int = 2, config: bytes = bytes(60), **changes: object) -> VirtioState:
    """Return a device whose virtio 1.x driver is running."""
    made = VirtioState(
        status=0xF, driver_features=1 << 32, features_locked=True, active=True, device_feature_select=0,
        driver_feature_select=1, queue_select=1, config_vector=0xFFFF, generation=3, config=config,
        config_pending=False, config_called=False, queues=(queue(),) * queues,
    )  # fmt: skip
    return made.replace(**changes)


def chip(name: str, **registers: int | bytes) -> ChipState:
    """Return a chip's state."""
    return ChipState(
        name=name,
        registers=tuple(
            Register(name=key, number=0, data=value) if isinstance(value, bytes) else Register(name=key, number=value)
            for key, value in registers.items()
        ),
    )


def machine_state(**changes: object) -> MachineState:
    """Return the state, without memory, of a machine without devices."""
    vcpu = VcpuState(
        mp_state=0, regs=b"", sregs=b"", xsave=b"", xcrs=b"", debugregs=b"", events=b"", lapic=b"", msrs=b"", tsc=1,
        tsc_deadline=None,
    )  # fmt: skip
    made = MachineState(
        vcpus=(vcpu,), irqchips=(b"", b"", b""), pit=b"", kvmclock_ns=1, chips=(chip("uart", lcr=3),), pci_address=0,
        functions=(PciFunctionState(slot=0, config=bytes(256), msix=b""),), virtio=(), vmmci=chip("vmmci", status=0),
    )  # fmt: skip
    return made.replace(**changes)
