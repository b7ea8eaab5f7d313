"""What has to be known of a sent machine before the first byte of its memory (docs/formats.md 4).

It is all that streamprobe knows of machines, so that there is little to load for it, and little to get wrong.
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
    features: int  # that its process offers
    layout: int = LAYOUT_FIRST  # of its PCI function (`slots`): BARs and capabilities stay where the guest found them
    serial: bytes = b""  # that a disk tells the guest; none: the name of its process, as before there were serials


class Header(Part):
    """What has to be known before the first byte of memory."""

    config: VmConfig
    one_shot: bool  # it ends where others reboot
    firmware_bytes: int
    touched_bytes: int  # of memory, for progress
    xsave_bytes: int
    tsc_khz: int
    cpuid: tuple[CpuidLeaf, ...]  # as KVM offered it to the sender, before each vCPU got its own
    devices: tuple[DeviceHead, ...]


def read_header(version: int, raw: bytes) -> Header:
    """Return the header in a stream of this version.  Raises ValueError."""
    return unpack(Header, raw, stream_v2.header) if version == stream_v2.VERSION else unpack(Header, raw)
