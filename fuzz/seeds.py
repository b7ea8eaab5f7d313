"""Valid inputs to start from, by target: what no mutation would find by chance, such as a magic number or a digest."""

import gzip
import os
import select
import struct
from pathlib import Path

from tests.support import filesystems, golden, saved
from tests.support.packets import DISCOVER, dhcp
from tests.support.seeds import seed_file, usual
from tests.unit.vm.boot import samples
from vmd.images.create import write_empty
from vmd.images.signatures import DISC_SIGNATURES, FOOTER, KOLY, SIGNATURES, VHD_FIXED
from vmd.ipc import imsg, probemsg
from vmd.ipc.messages.clients import ListRequest, Ok, StopRequest
from vmd.ipc.messages.vm import PauseVm
from vmd.vm.stream import COUNT, END, GPA, OLDEST, VERSION, Pipe, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]


def made(write: "Callable[[int], object]") -> bytes:
    """Return what a function writes to a descriptor."""
    fd = os.memfd_create("seed", os.MFD_CLOEXEC)
    try:
        write(fd)
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def small_stream(fd: int) -> None:
    """Write a stream of some memory and a small machine."""
    writer = StreamWriter(Pipe(os.dup(fd), select.POLLOUT))
    writer.header(imsg.pack(saved.header()))
    writer.runs(((0, 400), (4096, 100), (0, 100)), memoryview(b"memory" * 100))
    writer.state(imsg.pack(saved.machine_state(virtio=(saved.device(),))))
    writer.end()
    writer.hasher.close()
    writer.pipe.close()


def boot_images() -> list[bytes]:
    """Return one boot image of each kind that is loaded, none larger than what is fuzzed with."""
    xen = samples.note(b"Xen", 18, struct.pack("<I", samples.PVH_ENTRY), 8)
    code = samples.Part(1, 0x100000, b"\xf4" * 64)
    by_section = samples.elf_file([code], entry=0, sections=[samples.Named(b".note.Xen", 7, xen)])
    kernels = [
        samples.bzimage(),
        samples.put(samples.bzimage(), "<H", 0x236, 0x7E),  # without a 64-bit entry
        samples.put(samples.bzimage(), "<IB", 0x230, 0, 0)[:-8],  # not relocatable, rounded up
        samples.pvh(),
        samples.pvh(is64=False),
        by_section,
        samples.openbsd(),
        samples.openbsd(is64=False),
        samples.openbsd(stripped=True),
    ]
    return [*kernels, gzip.compress(kernels[3], mtime=0) + gzip.compress(b"", mtime=0) + b"x", samples.seabios(1 << 16)]


def recorded_stream(version: int) -> bytes:
    """Return what an earlier version wrote, with the first bytes of its memory only."""
    parts = golden.recorded(version, "clocks")
    (kind, body), *_, state, _ = parts.sections
    parts.sections = [(kind, body[: GPA.size + 100]), state, (END, COUNT.pack(2))]
    return parts.joined()


def seeds(target: str) -> list[bytes]:
    """Return the inputs of a target."""
    match target:
        case "config":
            return [(ROOT / "vm.conf.example").read_bytes(), b'vm "a" {\n disk "/dev/null"\n}\n']
        case "message":
            messages = (ListRequest(), StopRequest(name="a", force=True), Ok(notes=("note",)))
            return [imsg.encode(message)[0] for message in (*messages, PauseVm(vmid=1, paused=True))]
        case "probe-answer":
            probes = (
                probemsg.Probe(format="raw", size=512, guessed=True, looks="gzip"),
                probemsg.Probe(format="", size=512, guessed=True, looks="VMDK"),
                probemsg.Probe(format="qcow2", size=1 << 30, backing="b", backing_format="raw", notes=probemsg.NOTES),
            )
            return [*map(probemsg.pack_image, probes), probemsg.pack_error("is bad")]
        case "identify":
            starts = [bytes(at) + found for _, at, found in (*SIGNATURES, *DISC_SIGNATURES)]
            footer = FOOTER.pack(b"conectix", 2, 1 << 16, 1 << 20, 1 << 20, VHD_FIXED).ljust(512, b"\0")
            ends = [bytes(1024) + footer, bytes(1024) + KOLY.pack(b"koly", 4, 512).ljust(512, b"\0")]
            texts = [b"# comment\n\nversion=1\n", b'<?xml?><Envelope xmlns="http://x/ovf/envelope/1">']
            disc = bytes(0x8000) + b"\1CD001" + bytes(2041)
            ova = b"vm.ovf".ljust(257, b"\0") + b"ustar"
            base = made(lambda fd: write_empty(fd, "seed", "qcow2", 1 << 20, "base", "raw"))
            return [*starts, *ends, *texts, disc, ova, base]
        case "qcow2":
            return [made(lambda fd: write_empty(fd, "seed", "qcow2", 1 << 20))]
        case "boot-image":
            return boot_images()
        case "dhcp":
            return [dhcp(DISCOVER)]
        case "http":
            return [b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;q=0.5,*/*\r\n\r\n"]
        case "ring":
            table = struct.pack("<QIHH", 0x4000, 16, 1, 1) + struct.pack("<QIHH", 0x5000, 512, 3, 2)
            return [table + struct.pack("<QIHH", 0x6000, 1, 2, 0) + bytes(80 + 16) + bytes(64)]
        case "scsi":
            return [bytes((code,)) + bytes(15) for code in (0x12, 0x25, 0x28, 0x43, 0x1A, 0x5A, 0x46, 0x4A)]
        case "disk":
            return list(filesystems.small_disks().values())
        case "stream":
            return [*(recorded_stream(version) for version in range(OLDEST, VERSION)), made(small_stream)]
        case "seed":
            own = seed_file("#cloud-config\n")
            return [*map(imsg.pack, (usual(), usual(user_data=own, vendor_data=own, network_config=own)))]
    return []
