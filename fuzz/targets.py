"""The targets: functions that give an input to a parser of untrusted bytes and catch only the errors that it may raise.

Unit tests try these parsers with prefixes, bit flips and random bytes.  Here coverage guides the search.
"""

import contextlib
import functools
import hashlib
import operator
import os
import select
import struct
import zlib

import tests.support.messages  # noqa: F401 - registers all messages, so that each may be decoded
from fuzz import peers, registers
from tests.support.figures import unseen
from tests.support.packets import GUEST4, HOST4, HOST_LLADDR, LLADDR
from vmd.config import check
from vmd.devices.vioblk.request import Limits, parse
from vmd.devices.vionet import announce, dhcp, ra
from vmd.devices.vionet.addresses import LOOK_BYTES, Addresses
from vmd.devices.vionet.ethernet import HEADER_BYTES, IPV4, TYPE, checksum
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vioscsi.device import CONTROL, REQUEST, Vioscsi
from vmd.devices.vioscsi.scsi import GOOD, Drive
from vmd.diskfs.disk import Disk
from vmd.diskfs.source import WORK_MAX, DiskFsError
from vmd.errors import GuestError, ImageError, PeerError
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.images.bootsector import first_sector
from vmd.images.chain import Link, open_chain
from vmd.images.gpt import END_MAX, gpt_end
from vmd.images.header import parse_header
from vmd.images.identify import probe
from vmd.images.raw import RawImage
from vmd.images.snapshots import read_snapshots
from vmd.imgboot import bootconf
from vmd.ipc import devmsg, imsg, probemsg
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
IP_SUM = HEADER_BYTES + 10  # offset of the IPv4 header's checksum in a frame
NIC = Interface(
    lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4,
    prefix6=bytes.fromhex("fd00112233440305") + bytes(8),
)  # fmt: skip


def said(error: Exception) -> None:
    """Note that an input was refused.  Check that the refusal has a message."""
    peers.has_sentence(error)


def file_of(data: bytes) -> int:
    """Return a descriptor of a file with these bytes.  The caller closes it."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def config(data: bytes) -> None:
    """Parse a vm.conf."""
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


def answer(data: bytes) -> None:
    """Decode the answer of a process that answers one request: a probe, imgboot, seeder, streamprobe, lockholder."""
    if not peers.answer(data):
        said(ValueError("nobody's answer"))


def device(data: bytes) -> None:
    """Handle the answers and notifications of a device process."""
    if not peers.device(data):
        said(ValueError("nothing that a device says"))


def shared(data: bytes) -> None:
    """Read memory that the processes of a VM write: figures, and the backlog of a console."""
    if not peers.shared(data):
        said(ValueError("nothing in there"))


def snmp(data: bytes) -> None:
    """Parse packets of a master agent."""
    try:
        if not peers.snmp(data):
            said(ValueError("no packet"))
    except PeerError as error:
        said(error)


def lines(data: bytes) -> None:
    """Parse log lines."""
    if not peers.lines(data):
        said(ValueError("no line"))


def boot_conf(data: bytes) -> None:
    """Parse an /etc/boot.conf from a guest's disk."""
    try:
        bootconf.parse(data)
    except ValueError as error:
        said(error)


def identify(data: bytes) -> None:
    """Identify an image, as a disk and as the disc of a CD drive."""
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
            found = found.replace(notes=(*found.notes, *first_sector(fd, found.format)))
            assert probemsg.unpack(probemsg.pack_image(found)) == found
            probemsg.refusal(found, hint, "image", "raw:image")
    finally:
        os.close(fd)
    assert all(map(str, refusals))
    if len(refusals) == len(hints):
        said(refusals[0])


def qcow2(data: bytes) -> None:
    """Open an image, with a raw backing file if it names one.  Read its snapshots; read and write data."""
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
    """Load a kernel or firmware, or note why it is refused."""
    try:
        load_boot_image(data)
    except ImageError as error:
        said(error)


def with_ip_sum(frame: bytes) -> bytes:
    """Return a frame with a correct checksum in its IPv4 header, if it has one."""
    if len(frame) < HEADER_BYTES + 20 or frame[TYPE] != IPV4:
        return frame
    end = HEADER_BYTES + (frame[HEADER_BYTES] & 15) * 4
    before, after = frame[:IP_SUM], frame[IP_SUM + 2 :]
    return before + checksum((before + b"\0\0" + after)[HEADER_BYTES:end]).to_bytes(2, "big") + after


def dhcp_packet(data: bytes) -> None:
    """Answer a DHCP packet of a guest.  The UDP checksum is left to the device, as guests may do."""
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


class NoServices:
    """The services of a device process, without guest, time and readers of the figures."""

    def __init__(self, kind: str) -> None:
        self.figures = unseen(kind)
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")

    def post(self, job: "Callable[[], None]") -> None:
        """Run a job at once."""
        job()

    def call_after(self, _delay_s: float, _handler: "Callable[[], None]") -> None:
        """Time does not pass."""

    def interrupt(self, _queue: int) -> None:
        """There is no guest."""


def frame(data: bytes) -> None:
    """Parse a guest's frame: learn its addresses, and answer a request to the local network."""
    addresses, given = Addresses(LLADDR), list[bytes]()
    addresses.learn(data[:LOOK_BYTES])
    local = LocalNetwork(NIC, given.append, NoServices("vionet"), given.append)
    if local.concerns(data[: local.look_bytes]):
        local.answer(with_ip_sum(data), True)
    for entry in addresses.known:
        assert len(announce.address(LLADDR, entry)) <= 1514
    if not (given or addresses.known):
        said(ValueError("nothing of interest"))


def ring(data: bytes) -> None:
    """Walk the chains of a ring and parse them as requests to a disk."""
    with_ring(data, serve_ring)


def drive(data: bytes) -> None:
    """Walk the chains of a ring as requests or controls of a CD-ROM drive.  The first byte chooses."""
    number = CONTROL if data[:1] > b"\0" else REQUEST
    with_ring(data[1:], lambda memory: serve_drive(memory, number))


def serve_drive(memory: GuestMemory, number: int) -> None:
    """Serve a queue of a CD-ROM drive whose ring is in memory."""
    queue = Queue(memory, (1 << 28) | (1 << 29) | (1 << 32), RING_SIZE, DESC, AVAIL, USED)
    controller = Vioscsi(NoServices("vioscsi"), file_of(bytes(range(256)) * 256))
    try:
        controller.activate(0, [queue if each == number else None for each in range(3)])
        while controller.on_notify(number):
            pass
    except GuestError as error:
        said(error)
    finally:
        controller.quiesce(forget=True)
        controller.close()


def with_ring(data: bytes, serve: "Callable[[GuestMemory], None]") -> None:
    """Put a ring into memory, with its table, heads and the buffers that it describes, and serve it."""
    memory = GuestMemory.create([RegionSpec(gpa=0, size=MIB, name="ram")])
    try:
        table = data[: 16 * RING_SIZE]
        memory.load(DESC, table)
        memory.load(AVAIL, struct.pack("<HH", 0, RING_SIZE))
        memory.load(AVAIL + 4, data[16 * RING_SIZE : 16 * RING_SIZE + 2 * RING_SIZE])
        memory.load(DATA, data[18 * RING_SIZE : 18 * RING_SIZE + 4096])
        serve(memory)
    finally:
        memory.close()


def serve_ring(memory: GuestMemory) -> None:
    """Serve a disk's queue whose ring is in memory.  On return no view of the memory is left."""
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
    """Execute a SCSI command."""
    reply = Drive(700 * MIB).execute(data[:255])
    assert len(reply.data) <= 1 << 16
    if reply.status != GOOD:
        said(ValueError(f"sense {reply.sense.hex()}"))


def mended(data: bytes) -> bytes:
    """Return a stream with correct digests, as far as it has room for them."""
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
    """Return the machine in a stream, and the amount of its memory.  Raises StreamError or ValueError."""
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
    """Receive a machine from a stream."""
    try:
        receive(mended(data))
    except (StreamError, ValueError) as error:
        said(error)


def with_checksums(data: bytes) -> bytes:
    """Return a disk with correct checksums in its partition tables."""
    raw = bytearray(data)
    for at in (512, 1024, 4 * 512 + 512):  # offsets of the disklabels in the seeds
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
    """Return, for each file of FOUND_ON_DISKS, its first bytes or the error."""
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
    mended_disk = with_checksums(data)
    fd = file_of(mended_disk)
    image = RawImage(fd, "disk", writable=False)
    try:
        assert 0 <= gpt_end(image) <= END_MAX
    finally:
        image.close()
    for found in find_files(mended_disk):
        if isinstance(found, DiskFsError):
            said(found)


def http_request(data: bytes) -> None:
    """Parse a request of a client of `metrics listen`."""
    try:
        http.parse(data)
    except http.BadRequest as error:
        http.refusal(error.status)
        said(error)


def seed(data: bytes) -> None:
    """Make a disk from the packed parts of a seed, and produce the warnings about them."""
    with contextlib.suppress(ValueError, SeedError):
        parts = imsg.unpack(SeedParts, data)
        seed_image(parts)
        notes(parts)


TARGETS: "dict[str, Callable[[bytes], None]]" = {
    "config": config,
    "message": message,
    "answer": answer,
    "device": device,
    "shared": shared,
    "snmp": snmp,
    "log": lines,
    "boot-conf": boot_conf,
    "identify": identify,
    "qcow2": qcow2,
    "boot-image": boot_image,
    "registers": registers.run,
    "frame": frame,
    "dhcp": dhcp_packet,
    "http": http_request,
    "solicitation": solicitation,
    "ring": ring,
    "drive": drive,
    "scsi": command_block,
    "disk": disk,
    "stream": stream,
    "seed": seed,
}

UNPACKING = "decode unpack _count_fits _name_fds _record _named_record _checked _decoder"
SAID = "are_addresses export addresses _disk_status _kind _status _ready _error _handle_async _take_troubles"
# The modules of vmd that each target tests.  `make fuzz` prints how many of their lines it reaches.  If only some
# functions or classes of a module are parsers, their names follow after a colon.
PARSERS = {
    "config": ("config/grammar", "config/lexer", "config/values", "config/rules", "config/yacc: parse"),
    "message": (f"ipc/imsg: {UNPACKING}",),
    "answer": (
        "ipc/probemsg: fields_of unpack", "ipc/bootmsg: unpack_file", "ipc/seedmsg: unpack", "vm/streamprobe: unpack",
        "ipc/holdermsg: unpack",
    ),
    "device": (f"vm/devproc: {SAID}",),
    "shared": ("parent/figures: slots host_names", "backlog: Output Backlog LoggedBacklog"),
    "snmp": ("agentx/pdu: parse_header parse Reader",),
    "log": ("logger/source",),
    "boot-conf": ("imgboot/bootconf",),
    "identify": ("images/identify", "images/signatures", "images/header", "images/bootsector"),
    "qcow2": ("images/header", "images/qcow2", "images/refcounts", "images/snapshots"),
    "boot-image": ("vm/boot/elf", "vm/boot/image", "vm/boot/linux", "vm/boot/openbsd", "vm/boot/pvh"),
    "registers": (
        "vm/bus", "vm/pci", "vm/virtio", "virtio/transport", "vm/vmmci", "vm/boot/fwcfg", "vm/chips/acpipm",
        "vm/chips/i8042", "vm/chips/mc146818", "vm/chips/ns8250", "vm/chips/resetport",
    ),
    "frame": ("devices/vionet/addresses", "devices/vionet/local"),
    "dhcp": ("devices/vionet/dhcp",),
    "http": ("metrics/http",),
    "solicitation": ("devices/vionet/ra",),
    "ring": ("virtio/queue", "devices/vioblk/request"),
    "drive": ("devices/vioscsi/device",),
    "scsi": ("devices/vioscsi/scsi",),
    "disk": ("diskfs/partitions", "diskfs/ext", "diskfs/journal", "diskfs/ffs", "diskfs/walk", "images/gpt"),
    "stream": (
        "vm/stream: StreamReader runs_of", "vm/stream_v2", "vm/header", "vm/state: read_machine check_devices",
    ),
    "seed": ("seed/documents", "seed/iso", "seed/keys"),
}  # fmt: skip
