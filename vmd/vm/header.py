"""The header of a stream: what a receiver must know before it reads the machine's memory (docs/formats.md 4).

streamprobe imports no other record of a machine.  So it loads little code, and little code of it can be attacked.
"""

from vmd.config.model import VmConfig
from vmd.ipc.imsg import unpack
from vmd.record import Part, Record
from vmd.vm import stream_v2
from vmd.vm.slots import LAYOUT_FIRST


class CpuidLeaf(Record):
    """One entry of KVM_GET_CPUID2."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class DeviceHead(Record):
    """A virtio device that the machine must have."""

    kind: str
    slot: int
    features: int  # the feature bits that its process offers
    # The layout of its PCI function (`slots`): BARs and capabilities stay where the guest found them.
    layout: int = LAYOUT_FIRST
    # The serial number that a disk reports.  Empty: the name of its process, which older versions reported.
    serial: bytes = b""


class Header(Part):
    """The header's record."""

    config: VmConfig
    one_shot: bool  # the VM ends when the guest reboots
    firmware_bytes: int
    touched_bytes: int  # memory that the guest has touched, for the progress display
    xsave_bytes: int
    tsc_khz: int
    cpuid: tuple[CpuidLeaf, ...]  # as KVM offered it to the sender, before it was adapted to each vCPU
    devices: tuple[DeviceHead, ...]


def read_header(version: int, raw: bytes) -> Header:
    """Return the header of a stream of this version.  Raises ValueError."""
    return unpack(Header, raw, stream_v2.header) if version == stream_v2.VERSION else unpack(Header, raw)
