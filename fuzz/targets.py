"""Parsers of untrusted bytes, each with what it may raise: a function that takes an input and returns, or fails.

Unit tests hold these parsers against prefixes, bit flips and random bytes; here coverage leads the way.
"""

import contextlib
import functools
import hashlib
import operator
import os
import select
import struct
import zlib

import tests.support.messages  # noqa: F401 - any of them may be decoded
from tests.support.packets import GUEST4, HOST4, HOST_LLADDR, LLADDR
from vmd.config import check
from vmd.devices.vioblk.request import Limits, parse
from vmd.devices.vionet import dhcp, ra
from vmd.devices.vionet.ethernet import HEADER_BYTES, IPV4, TYPE, checksum
from vmd.devices.vionet.interface import Interface
from vmd.devices.vioscsi.scsi import GOOD, Drive
from vmd.diskfs.disk import Disk
from vmd.diskfs.source import WORK_MAX, DiskFsError
from vmd.errors import GuestError, ImageError, PeerError
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.images.chain import Link, open_chain
from vmd.images.header import parse_header
from vmd.images.identify import probe
from vmd.images.snapshots import read_snapshots
from vmd.imgboot import bootconf
from vmd.ipc import bootmsg, imsg, probemsg
from vmd.metrics import http
from vmd.seed.documents import notes, seed_image
from vmd.seed.parts import SeedError, SeedParts
from vmd.virtio.queue import Queue
from vmd.vm import state
from vmd.vm.boot import loader
from vmd.vm.header import read_header
from vmd.vm.machine import memory_regions
from vmd.vm.stream import DIGEST_BYTES, PREAMBLE, SECTION, Pipe, StreamError, StreamReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
RING_SIZE = 8
DESC, AVAIL, USED, DATA = 0x1000, 0x2000, 0x3000, 0x4000
IP_SUM = HEADER_BYTES + 10  # where the checksum of an IPv4 header is in a frame
NIC = Interface(
    lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4,
    prefix6=bytes.fromhex("fd00112233440305") + bytes(8),
)  # fmt: skip


def said(error: Exception) -> None:
    """Note that an input was refused; check that the refusal has a sentence."""
    if not str(error):
        raise RuntimeError(f"{type(error).__name__} without a sentence")


def file_of(data: bytes) -> int:
    """Return a file with these bytes; the caller's to close."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def config(data: bytes) -> None:
    """Read a vm.conf."""
    fd = file_of(data)
    try:
        check.load(f"/proc/self/fd/{fd}", warn=lambda _text: None)
    except check.ConfigErrors as errors:
        said(errors)
    finally:
        os.close(fd)


def message(data: bytes) -> None:
    """Decode a message between processes."""
    try:
        imsg.decode(data, [], "peer")
    except PeerError as error:
        said(error)


def probe_answer(data: bytes) -> None:
    """Decode what imgprobe says."""
    try:
        probemsg.unpack(data)
    except ValueError as error:
        said(error)


def boot_answer(data: bytes) -> None:
    """Decode what imgboot says."""
    try:
        bootmsg.unpack_file(data)
    except ValueError as error:
        said(error)


def boot_conf(data: bytes) -> None:
    """Read an /etc/boot.conf from somebody's disk."""
    try:
        bootconf.parse(data)
    except ValueError as error:
        said(error)


def identify(data: bytes) -> None:
    """Tell what an image is, as a disk and as a disc."""
    fd = file_of(data)
    refusals: list[Exception] = []
    hints = ("", "qcow2", probemsg.DISC)
    try:
        for hint in hints:
            try:
                found = probe(fd, "image", hint)
            except ImageError as error:
                refusals.append(error)
                continue
            assert probemsg.unpack(probemsg.pack_image(found)) == found
            probemsg.refusal(found, hint, "image", "raw:image")
    finally:
        os.close(fd)
    assert all(map(str, refusals))
    if len(refusals) == len(hints):
        said(refusals[0])


def qcow2(data: bytes) -> None:
    """Open an image, on top of a raw one if it names any; read its snapshots, read and write it."""
    fd = file_of(data)
    try:
        header = parse_header(fd, "image")
        read_snapshots(fd, header, "image")
        links = [Link(fd=os.dup(fd), path="image", format="qcow2")]
        if header.backing:
            links.append(Link(fd=file_of(bytes(range(256)) * 8), path="base", format="raw"))
        image = open_chain(links, writable=True)
    except (ImageError, OSError) as error:
        os.close(fd)
        said(error)
        return
    buffer = memoryview(bytearray(4096))
    try:
        for offset in (0, image.size // 2 & ~511, max(0, image.size - 4096) & ~511):
            if offset + len(buffer) <= image.size:
                for call in (image.preadv, image.pwritev):
                    try:
                        call(offset, [buffer])
                    except OSError as error:
                        said(error)
    finally:
        try:
            image.close()
        except OSError as error:
            said(error)
        os.close(fd)


def load_boot_image(data: bytes) -> None:
    """Load a kernel or firmware.  Raises ImageError."""
    fd = file_of(data)
    try:
        regions = memory_regions(16 * MIB, loader.firmware_bytes(fd, "kernel"))
        memory = GuestMemory.create(regions)
        try:
            loader.load(memory, fd, "kernel", memory_bytes=16 * MIB)
        finally:
            memory.close()
    finally:
        os.close(fd)


def boot_image(data: bytes) -> None:
    """Load a kernel or firmware, or say why not."""
    try:
        load_boot_image(data)
    except ImageError as error:
        said(error)


def with_ip_sum(frame: bytes) -> bytes:
    """Return a frame with the checksum that belongs to its IPv4 header, if it has one."""
    if len(frame) < HEADER_BYTES + 20 or frame[TYPE] != IPV4:
        return frame
    end = HEADER_BYTES + (frame[HEADER_BYTES] & 15) * 4
    before, after = frame[:IP_SUM], frame[IP_SUM + 2 :]
    return before + checksum((before + b"\0\0" + after)[HEADER_BYTES:end]).to_bytes(2, "big") + after


def dhcp_packet(data: bytes) -> None:
    """Answer what a guest sends, with the checksum of UDP left to the device as guests may do."""
    try:
        reply = dhcp.answer(with_ip_sum(data), NIC, sum_missing=True)
    except dhcp.Unanswered as reason:
        said(reason)
        return
    if reply is None:
        said(ValueError("nothing for a DHCP server"))
        return
    assert len(reply.frame) <= 1514


def solicitation(data: bytes) -> None:
    """Recognise a router solicitation, with its checksum left to the device."""
    if not ra.is_solicitation(data, NIC, sum_missing=True):
        said(ValueError("no router solicitation"))


def ring(data: bytes) -> None:
    """Walk the chains of a ring and parse them as requests to a disk."""
    memory = GuestMemory.create([RegionSpec(gpa=0, size=MIB, name="ram")])
    try:
        table = data[: 16 * RING_SIZE]
        memory.load(DESC, table)
        memory.load(AVAIL, struct.pack("<HH", 0, RING_SIZE))
        memory.load(AVAIL + 4, data[16 * RING_SIZE : 16 * RING_SIZE + 2 * RING_SIZE])
        memory.load(DATA, data[18 * RING_SIZE : 18 * RING_SIZE + 4096])
        serve_ring(memory)
    finally:
        memory.close()


def serve_ring(memory: GuestMemory) -> None:
    """Do so with what is there; the queue's views of memory go with it."""
    queue = Queue(memory, (1 << 28) | (1 << 29) | (1 << 32), RING_SIZE, DESC, AVAIL, USED)
    served = 0
    try:
        while (chain := queue.take()) is not None:
            parse(chain, memory, Limits(MIB, writable=True, discard=True, write_zeroes=True))
            queue.put(chain.head, 0)
            served += 1
    except GuestError as error:
        said(error)
    if not served:
        said(ValueError("no request"))
    queue.publish()


def command_block(data: bytes) -> None:
    """Carry out a SCSI command."""
    reply = Drive(700 * MIB).execute(data[:255])
    assert len(reply.data) <= 1 << 16
    if reply.status != GOOD:
        said(ValueError(f"sense {reply.sense.hex()}"))


def mended(data: bytes) -> bytes:
    """Return a stream with the digests that belong to it, as far as it has room for them."""
    raw, at = bytearray(data), 0
    length = PREAMBLE.unpack_from(raw)[2] + PREAMBLE.size if len(raw) >= PREAMBLE.size else len(raw)
    while at + length + DIGEST_BYTES <= len(raw):
        end = at + length
        raw[end : end + DIGEST_BYTES] = hashlib.sha256(raw[at:end]).digest()
        at = end + DIGEST_BYTES
        if at + SECTION.size > len(raw):
            break
        length = SECTION.size + SECTION.unpack_from(raw, at)[2]
    return bytes(raw)


def receive(data: bytes) -> "tuple[state.MachineState, int]":
    """Return the machine in a stream, and how much memory came with it.  Raises StreamError or ValueError."""
    fd = file_of(data)
    reader = StreamReader(Pipe(fd, select.POLLIN))
    machines: list[state.MachineState] = []
    lengths: list[int] = []

    def place(gpa: int, data: memoryview) -> None:
        if gpa + len(data) > MIB:
            raise ValueError("no memory there")
        lengths.append(len(data))

    try:
        raw = reader.header()
        header = read_header(reader.version, raw)
        state.check_devices(header)
        reader.sections_until_end(
            place, lambda body: machines.append(state.read_machine(reader.version, body)), state_max=MIB
        )
    finally:
        os.close(fd)
    if len(machines) != 1:
        raise ValueError(f"{len(machines)} machines")
    return machines[0], sum(lengths)


def stream(data: bytes) -> None:
    """Receive a machine."""
    try:
        receive(mended(data))
    except (StreamError, ValueError) as error:
        said(error)


def with_checksums(data: bytes) -> bytes:
    """Return a disk whose partition tables have the checksums that belong to them."""
    raw = bytearray(data)
    for at in (512, 1024, 4 * 512 + 512):  # of a disklabel, in the places that the seeds have it
        count = int.from_bytes(raw[at + 138 : at + 140], "little")
        end = at + 148 + 16 * count
        if raw[at : at + 4] == b"\x57\x45\x56\x82" and end <= len(raw):
            raw[at + 136 : at + 138] = bytes(2)
            words = struct.unpack_from(f"<{(end - at) // 2}H", raw, at)
            raw[at + 136 : at + 138] = functools.reduce(operator.xor, words).to_bytes(2, "little")
    if raw[512:520] == b"EFI PART" and len(raw) >= 1024:
        length, first, count, size = (*struct.unpack_from("<I", raw, 524), *struct.unpack_from("<QII", raw, 584))
        if (first * 512 + count * size) <= len(raw):
            struct.pack_into("<I", raw, 600, zlib.crc32(raw[first * 512 : first * 512 + count * size]))
        if length <= 512:
            struct.pack_into("<I", raw, 528, 0)
            struct.pack_into("<I", raw, 528, zlib.crc32(raw[512 : 512 + length]))
    return bytes(raw)


FOUND_ON_DISKS = ("/kernel", "/boot/kernel", "/" + "l" * 100)
READ_OF_FILES = 1 << 20


def find_files(data: bytes) -> "list[bytes | DiskFsError]":
    """Return the first bytes of each file of FOUND_ON_DISKS, or why it cannot be read."""
    found: list[bytes | DiskFsError] = []
    try:
        disk = Disk(lambda offset, length: data[offset : offset + length], len(data))
    except DiskFsError as error:
        return [error]
    assert disk.describe().isprintable()
    for path in FOUND_ON_DISKS:
        try:
            file = disk.find(path)
            first, end, total = b"", 0, 0
            for offset, piece in file.pieces():
                assert end <= offset
                end, first, total = offset + len(piece), first or piece[:64], total + len(piece)
                if total > READ_OF_FILES:
                    break
            assert end <= file.size
            found.append(first)
        except DiskFsError as error:
            found.append(error)
    assert all(str(each).isprintable() for each in found if isinstance(each, DiskFsError))
    assert disk.source.store.work > -(WORK_MAX // 2)
    return found


def disk(data: bytes) -> None:
    """Look for files on a disk."""
    for found in find_files(with_checksums(data)):
        if isinstance(found, DiskFsError):
            said(found)


def http_request(data: bytes) -> None:
    """Read what a client of `metrics listen` says."""
    try:
        http.parse(data)
    except http.BadRequest as error:
        http.refusal(error.status)
        said(error)


def seed(data: bytes) -> None:
    """Make a disk from the packed parts of a seed, and say what is strange about them."""
    with contextlib.suppress(ValueError, SeedError):
        parts = imsg.unpack(SeedParts, data)
        seed_image(parts)
        notes(parts)


TARGETS: "dict[str, Callable[[bytes], None]]" = {
    "config": config,
    "message": message,
    "probe-answer": probe_answer,
    "boot-answer": boot_answer,
    "boot-conf": boot_conf,
    "identify": identify,
    "qcow2": qcow2,
    "boot-image": boot_image,
    "dhcp": dhcp_packet,
    "http": http_request,
    "solicitation": solicitation,
    "ring": ring,
    "scsi": command_block,
    "disk": disk,
    "stream": stream,
    "seed": seed,
}

# Modules of vmd that a target is there for: `make fuzz` prints how many of their lines it reaches.
PARSERS = {
    "config": ("config/grammar", "config/lexer", "config/rules"),
    "message": ("ipc/imsg",),
    "probe-answer": ("ipc/probemsg",),
    "identify": ("images/identify", "images/signatures", "images/header"),
    "qcow2": ("images/header", "images/qcow2", "images/refcounts", "images/snapshots"),
    "boot-image": ("vm/boot/elf", "vm/boot/image", "vm/boot/linux", "vm/boot/openbsd", "vm/boot/pvh"),
    "dhcp": ("devices/vionet/dhcp",),
    "http": ("metrics/http",),
    "solicitation": ("devices/vionet/ra",),
    "ring": ("virtio/queue", "devices/vioblk/request"),
    "scsi": ("devices/vioscsi/scsi",),
    "disk": ("diskfs/partitions", "diskfs/ext", "diskfs/journal", "diskfs/ffs", "diskfs/walk"),
    "stream": ("vm/stream",),
    "seed": ("seed/documents", "seed/iso"),
}
