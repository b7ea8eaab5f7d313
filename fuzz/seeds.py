"""Valid inputs to start from, by target: what no mutation would find by chance, such as a magic number or a digest."""

import gzip
import os
import select
import struct
import zlib
from pathlib import Path

from tests.support import filesystems, golden, saved
from tests.support.packets import (
    DISCOVER,
    GUEST4,
    HOST4,
    INFORM,
    LLADDR,
    REQUEST,
    bootp,
    dhcp,
    option,
    request,
    solicitation,
)
from tests.support.seeds import seed_file, usual
from tests.unit.vm.boot import samples
from vmd.images.header import BACKING_FORMAT, EXTENSION, HEADER_V2, HEADER_V3, V3_BYTES
from vmd.images.signatures import DISC_SIGNATURES, FOOTER, KOLY, QCOW_MAGIC, SIGNATURES, VHD_FIXED
from vmd.images.snapshots import Snapshot, pack_snapshots
from vmd.ipc import bootmsg, imsg, probemsg
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


def small_qcow2(version: int, *, backing: bytes = b"", snapshot: bool = False) -> bytes:
    """Return an image of 32 KiB in clusters of 512 bytes: one of data, one compressed, in version 3 one of zeroes.

    Each table has a cluster of its own, in this order: header, refcount table and block, L1, L2, data, compressed data,
    L1 of the snapshot, table of snapshots.
    """
    bits, clusters = 9, 9
    at = [number << bits for number in range(clusters)]
    _, refcount_table, refcounts, l1, l2, data, packed, old_l1, table = at
    shared = 2 if snapshot else 1  # of what both L1 tables lead to
    copied = 0 if snapshot else 1 << 63
    squeeze = zlib.compressobj(wbits=-12)
    squeezed = squeeze.compress(b"compressed" * 51 + b"!!") + squeeze.flush()
    extensions = EXTENSION.pack(BACKING_FORMAT, 3) + b"raw".ljust(8, b"\0") if backing else b""
    extensions += EXTENSION.pack(0, 0)
    name_at = V3_BYTES + len(extensions) if backing else 0
    header = HEADER_V2.pack(
        QCOW_MAGIC, version, name_at, len(backing), bits, 1 << 15, 0, 1, l1, refcount_table, 1, snapshot, table
    )
    if version == 3:
        header += HEADER_V3.pack(0, 0, 0, 4, V3_BYTES) + extensions + backing
    old = Snapshot(id="1", name="old", l1_offset=old_l1, l1_entries=1, size=1 << 15)
    zeroes = 1 if version == 3 else 0
    counts = [1, 1, 1, 1, shared, shared, shared, 1, 1]
    parts = {
        0: header,
        refcount_table: struct.pack(">Q", refcounts),
        refcounts: struct.pack(f">{clusters}H", *counts),
        l1: struct.pack(">Q", copied | l2),
        l2: struct.pack(">QQQ", copied | data, 1 << 62 | packed, zeroes),
        data: b"data" * 128,
        packed: squeezed,
        old_l1: struct.pack(">Q", l2),
        table: pack_snapshots([old]),
    }
    return b"".join(parts[start].ljust(1 << bits, b"\0") for start in at)


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
        case "boot-answer":
            found = bootmsg.BootFile(size=1 << 20, name="disk0:/vmlinuz")
            files = found, found.replace(options="as")
            return [*map(bootmsg.pack_file, files), bootmsg.pack_error("is bad")]
        case "boot-conf":
            return [b"set tty com0\nset device hd0a\nset image /bsd.mp\n", b"boot hd0d:/bsd -s\n", b"boot -c\n"]
        case "identify":
            starts = [bytes(at) + found for _, at, found in (*SIGNATURES, *DISC_SIGNATURES)]
            footer = FOOTER.pack(b"conectix", 2, 1 << 16, 1 << 20, 1 << 20, VHD_FIXED).ljust(512, b"\0")
            ends = [bytes(1024) + footer, bytes(1024) + KOLY.pack(b"koly", 4, 512).ljust(512, b"\0")]
            texts = [b"# comment\n\nversion=1\n", b'<?xml?><Envelope xmlns="http://x/ovf/envelope/1">']
            disc = bytes(0x8000) + b"\1CD001" + bytes(2041)
            ova = b"vm.ovf".ljust(257, b"\0") + b"ustar"
            return [*starts, *ends, *texts, disc, ova, small_qcow2(3, backing=b"base")]
        case "qcow2":
            return [small_qcow2(2), small_qcow2(3), small_qcow2(3, backing=b"base"), small_qcow2(3, snapshot=True)]
        case "boot-image":
            return boot_images()
        case "dhcp":
            client = option(57, b"\x05\xdc") + option(61, b"\1" + LLADDR) + option(55, b"\1\3\6\x0c\x1a")
            overloaded = bootp(option(52, b"\1") + b"\xff", file=option(53, bytes((DISCOVER,))) + b"\xff")
            return [
                dhcp(DISCOVER),
                dhcp(REQUEST, requested=GUEST4, more=option(54, HOST4)),
                dhcp(REQUEST, more=client, ciaddr=GUEST4, flags=0x8000),
                dhcp(INFORM, ciaddr=GUEST4, more=option(12, b"guest") * 2),
                request(overloaded),
                request(bootp(b"", cookie=bytes(4))),
            ]
        case "solicitation":
            unknown = b"\x0e\1abcdef\1\1" + LLADDR
            return [solicitation(), solicitation(bytes(16), options=b""), solicitation(options=unknown)]
        case "http":
            return [b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;q=0.5,*/*\r\n\r\n"]
        case "ring":
            table = struct.pack("<QIHH", 0x4000, 16, 1, 1) + struct.pack("<QIHH", 0x5000, 512, 3, 2)
            return [table + struct.pack("<QIHH", 0x6000, 1, 2, 0) + bytes(80 + 16) + bytes(64)]
        case "scsi":
            plain = [bytes((code,)) for code in (0x12, 0x25, 0x28, 0x43, 0x46)]
            sense = [bytes((0x1A, 0, 0x2A, 0, 255)), bytes((0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 255))]
            event = bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8))
            return [block.ljust(16, b"\0") for block in (*plain, *sense, event)]
        case "disk":
            return list(filesystems.small_disks().values())
        case "stream":
            return [*(recorded_stream(version) for version in range(OLDEST, VERSION)), made(small_stream)]
        case "seed":
            own = seed_file("#cloud-config\n")
            return [*map(imsg.pack, (usual(), usual(user_data=own, vendor_data=own, network_config=own)))]
    return []
