"""Valid seed inputs by target.  They have parts that no mutation finds by chance, such as magic numbers and digests."""

import gzip
import os
import re
import select
import struct
import zlib
from pathlib import Path

from fuzz import peers, registers
from tests.support import filesystems, golden, saved
from tests.support.packets import (
    DECLINE,
    DISCOVER,
    GUEST4,
    GUEST_LL,
    HOST4,
    INFORM,
    LLADDR,
    RELEASE,
    REQUEST,
    bootp,
    dhcp,
    option,
    request,
    solicitation,
)
from tests.support.seeds import seed_file, usual
from tests.unit.vm.boot import samples
from vmd.agentx import pdu
from vmd.devices.vionet import announce
from vmd.images.header import (
    BACKING_FORMAT,
    DIRTY,
    EXTENDED_L2,
    EXTENSION,
    FEATURE_NAMES,
    HEADER_V2,
    HEADER_V3,
    V3_BYTES,
)
from vmd.images.signatures import DISC_SIGNATURES, FOOTER, KOLY, QCOW_MAGIC, SIGNATURES, VHD_FIXED
from vmd.images.snapshots import Snapshot, pack_snapshots
from vmd.ipc import bootmsg, devmsg, holdermsg, imsg, probemsg, seedmsg
from vmd.ipc.messages.clients import ListRequest, Ok, StopRequest
from vmd.ipc.messages.vm import PauseVm
from vmd.vm import streamprobe
from vmd.vm.stream import COUNT, END, GPA, OLDEST, VERSION, Pipe, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]


def made(write: "Callable[[int], object]") -> bytes:
    """Return the bytes that a function writes to a descriptor."""
    fd = os.memfd_create("seed", os.MFD_CLOEXEC)
    try:
        write(fd)
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def file_of(data: bytes) -> int:
    """Return a descriptor at the beginning of a file with these bytes.  The caller closes it."""
    fd = os.memfd_create("seed", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def small_stream(fd: int) -> None:
    """Write a stream with some memory and a small machine."""
    writer = StreamWriter(Pipe(os.dup(fd), select.POLLOUT))
    writer.header(imsg.pack(saved.header()))
    writer.runs(((0, 400), (4096, 100), (0, 100)), memoryview(b"memory" * 100))
    writer.state(imsg.pack(saved.machine_state(virtio=(saved.device(),))))
    writer.end()
    writer.hasher.close()
    writer.pipe.close()


def small_qcow2(
    version: int, *, backing: bytes = b"", snapshot: bool = False, incompatible: int = 0, named: bytes = b""
) -> bytes:
    """Return an image of 32 KiB with 512-byte clusters: one of data, one compressed, and in version 3 one of zeroes.

    In version 3 it may have `incompatible` features, and a `named` one in its feature name table.

    Each table has a cluster of its own, in this order: header, refcount table and block, L1, L2, data, compressed data,
    L1 of the snapshot, snapshot table.
    """
    bits, clusters = 9, 9
    at = [number << bits for number in range(clusters)]
    _, refcount_table, refcounts, l1, l2, data, packed, old_l1, table = at
    shared = 2 if snapshot else 1  # reference count of the clusters that both L1 tables lead to
    copied = 0 if snapshot else 1 << 63
    squeeze = zlib.compressobj(wbits=-12)
    squeezed = squeeze.compress(b"compressed" * 51 + b"!!") + squeeze.flush()
    extensions = EXTENSION.pack(BACKING_FORMAT, 3) + b"raw".ljust(8, b"\0") if backing else b""
    if named:
        number = incompatible.bit_length() - 1
        extensions += EXTENSION.pack(FEATURE_NAMES, 48) + bytes((0, number)) + named.ljust(46, b"\0")
    extensions += EXTENSION.pack(0, 0)
    name_at = V3_BYTES + len(extensions) if backing else 0
    header = HEADER_V2.pack(
        QCOW_MAGIC, version, name_at, len(backing), bits, 1 << 15, 0, 1, l1, refcount_table, 1, snapshot, table
    )
    if version == 3:
        header += HEADER_V3.pack(incompatible, 0, 0, 4, V3_BYTES) + extensions + backing
    old = Snapshot(
        id="1", name="old", l1_offset=old_l1, l1_entries=1, size=1 << 15, date_s=0, date_ns=0, clock_ns=0, state_bytes=0
    )
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
    """Return one boot image of each supported kind, none larger than the inputs of the fuzzer."""
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
    """Return a stream that an earlier version wrote, with only the first bytes of its memory."""
    parts = golden.recorded(version, "clocks")
    (kind, body), *_, state, _ = parts.sections
    parts.sections = [(kind, body[: GPA.size + 100]), state, (END, COUNT.pack(2))]
    return parts.joined()


def configurations() -> list[bytes]:
    """Return the example without comments, and each of its blocks alone, because short inputs are tried more often."""
    text = re.sub(r'(?m)^#.*\n|(?<=\s)#[^"\n]*$', "", (ROOT / "vm.conf.example").read_text())
    head, *_ = re.split(r"(?m)^(?:vm|switch) ", text)
    blocks: list[str] = re.findall(r"(?ms)^(?:vm|switch) .*?^}\n", text)
    return [text.encode(), *((head + block).encode() for block in blocks), b'vm "a" {\n disk "/dev/null"\n}\n']


def disk_says() -> bytes:
    """Return the answers and notifications of a disk, in the order of `peers.Impostor.take`."""
    ready = devmsg.READY_HEAD.pack(devmsg.READY, 0x1234, 60) + bytes(60)
    row = devmsg.QUEUE.pack(256, True, 0, 0x1000, 0x2000, 0x3000, 5, 5)
    status = [devmsg.STATUS.pack(kind, 0) for kind in (devmsg.RESET, devmsg.SETTLE, devmsg.TAKE_BACK)]
    trouble = devmsg.TYPE.pack(devmsg.TROUBLES)
    return peers.joined(
        ready, devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, 1) + row + b"own", devmsg.TYPE.pack(devmsg.ADDRESSES), ready,
        *status,
        devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 1) + b"descriptor 7 outside a table of 4",
        devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, 0x1234, 60) + bytes(60),
        devmsg.ERROR_HEAD.pack(devmsg.CHANGED, 5) + b"no", trouble + b"no space\0dirty", trouble,
        devmsg.TYPE.pack(devmsg.LOCK_LOST) + b"lost", devmsg.ERROR_HEAD.pack(devmsg.ERROR, 0) + b"bad",
    )  # fmt: skip


def interface_says() -> bytes:
    """Return the answers and notifications of an interface, in the same order."""
    ready = devmsg.READY_HEAD.pack(devmsg.READY, 0x1234, 12) + bytes(12)
    known = devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_6, GUEST_LL)
    return peers.joined(
        ready, devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, 0), devmsg.TYPE.pack(devmsg.ADDRESSES) + known, ready,
        devmsg.STATUS.pack(devmsg.RESET, 1), b"", b"", devmsg.TYPE.pack(devmsg.ASK_RESOLVERS),
        devmsg.TYPE.pack(devmsg.LEASE),
    )  # fmt: skip


def shared_memory() -> bytes:
    """Return figures of two devices, with a host name.  They also serve as the counters of a backlog."""
    slot = bytearray(devmsg.FIGURES_SLOT_BYTES)
    struct.pack_into("<QQQ", slot, 0, 1 + devmsg.FIGURES_KINDS.index("vionet"), 0, len(devmsg.FIGURES["vionet"]))
    slot[-devmsg.HOST_NAME_BYTES :] = b"guest".ljust(devmsg.HOST_NAME_BYTES, b"\0")
    other = struct.pack("<QQQ", 1 + devmsg.FIGURES_KINDS.index("vioblk"), 1, 3).ljust(devmsg.FIGURES_SLOT_BYTES, b"\1")
    return bytes(slot) + other


def snmp_packets() -> list[bytes]:
    """Return packets of a master agent: responses and requests of each kind, in both byte orders."""
    name = (*pdu.INTERNET, 2, 1, 236)
    asked = pdu.oid(name, include=True) + pdu.oid(())
    numbers = [pdu.bind(pdu.INTEGER, name, 1), pdu.bind(pdu.COUNTER64, name, 2)]
    others = [pdu.bind(pdu.OBJECT_IDENTIFIER, name, name), pdu.bind(min(pdu.EMPTY), name)]
    binds = [*numbers, pdu.bind(min(pdu.STRINGS), name, b"abc"), *others]
    packets = [
        pdu.packet(pdu.RESPONSE, pdu.response(0, 0, binds), session=1, number=1),
        pdu.packet(pdu.GET, asked, session=1, context=b"ctx"),
        pdu.packet(pdu.GET_NEXT, asked * 2, session=1),
        pdu.packet(pdu.GET_BULK, struct.pack(">HH", 0, 10) + asked, session=1),
        pdu.packet(pdu.TEST_SET, b"".join(binds), session=1, transaction=2),
        pdu.packet(pdu.COMMIT_SET, session=1, transaction=2),
        pdu.packet(pdu.CLOSE, struct.pack(">BBBB", 5, 0, 0, 0), session=1),
    ]
    little = pdu.LITTLE_HEADER.pack(pdu.VERSION, pdu.CLOSE, 0, 0, 1, 0, 0, 4) + bytes(4)
    return [*packets, b"".join(packets) + little]


def drive_rings() -> list[bytes]:
    """Return rings with one request each: commands and controls.  The first byte of the input is the kind of queue."""
    lun = bytes((1, 0, 0x40, 0, 0, 0, 0, 0))

    def of(head: bytes, answer: int, room: int, queue: bytes = b"\0") -> bytes:
        parts = [(0x4000, len(head), 1, 1), (0x6000, answer, 3 if room else 2, 2), (0x8000, room, 2, 0)]
        table = b"".join(struct.pack("<QIHH", *part) for part in parts)
        return queue + table.ljust(16 * 8, b"\0") + bytes(16) + head

    read = struct.pack(">BBIBHB", 0x28, 0, 4, 0, 2, 0)
    commands = (read, bytes((0x12, 0, 0, 0, 36, 0)), bytes((0x00,)), bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)), b"\xee")
    requests = [of(struct.pack("<8sQBBB", lun, 1, 0, 0, 0) + each.ljust(32, b"\0"), 108, 4096) for each in commands]
    requests.append(of(struct.pack("<8sQBBB", bytes(8), 1, 0, 0, 0) + bytes(32), 108, 0))
    controls = [(struct.pack("<II8sQ", 0, kind, lun, 1), 1) for kind in range(9)]
    controls += [(struct.pack("<I8sI", kind, lun, 4), 5) for kind in (1, 2)]
    return [*requests, *(of(head, size, 0, b"\1") for head, size in controls)]


def seeds(target: str) -> list[bytes]:
    """Return the seeds of a target."""
    match target:
        case "config":
            return configurations()
        case "message":
            messages = (ListRequest(), StopRequest(name="a", force=True), Ok(notes=("note",)))
            return [imsg.encode(message)[0] for message in (*messages, PauseVm(vmid=1, paused=True))]
        case "answer":
            found = bootmsg.BootFile(size=1 << 20, name="disk0:/vmlinuz")
            probes = (
                probemsg.Probe(format="raw", size=512, guessed=True, looks="gzip"),
                probemsg.Probe(format="", size=512, guessed=True, looks="VMDK"),
                probemsg.Probe(format="qcow2", size=1 << 30, backing="b", backing_format="raw", notes=probemsg.NOTES),
            )
            return [
                *map(probemsg.pack_image, probes),
                *map(bootmsg.pack_file, (found, found.replace(options="as"))),
                seedmsg.pack_made(["a note", "another one"]),
                probemsg.pack_error("is bad"),
                holdermsg.pack(4711, 1000, b"qemu-system-x86"),
                streamprobe.probe(Pipe(file_of(made(small_stream)), select.POLLIN)),
                bytes((streamprobe.ERROR,)) + b"the stream ends too early",
            ]
        case "device":
            return [b"\0" + disk_says(), b"\1" + interface_says()]
        case "shared":
            return [shared_memory()]
        case "snmp":
            return snmp_packets()
        case "log":
            said = (b"<6>vm/a: running", b"<3>vm/a/vioblk0: bad", b"<4>other: x", b"Traceback:\n  File", b"\nError\n")
            return [peers.joined(*said, b"left")]
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
            plain = [small_qcow2(2), small_qcow2(3), small_qcow2(3, incompatible=DIRTY)]
            return [*plain, small_qcow2(3, backing=b"base"), small_qcow2(3, snapshot=True)]
        case "boot-image":
            return boot_images()
        case "registers":
            return registers.drivers()
        case "frame":
            return [
                announce.router_address(LLADDR, GUEST4),
                announce.address(LLADDR, devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_6, GUEST_LL)),
                announce.address(LLADDR, devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_ROUTER, GUEST_LL)),
                dhcp(DISCOVER),
                solicitation(),
            ]
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
        case "drive":
            return drive_rings()
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


def refused(target: str) -> list[bytes]:
    """Return inputs that a target refuses, for code that no valid input reaches."""
    match target:
        case "qcow2":
            new = small_qcow2(3, incompatible=1 << 9, named=b"a new feature")
            return [small_qcow2(3, incompatible=EXTENDED_L2), new]
        case "dhcp":
            return [dhcp(DECLINE, requested=GUEST4), dhcp(RELEASE, ciaddr=GUEST4)]
    return []
