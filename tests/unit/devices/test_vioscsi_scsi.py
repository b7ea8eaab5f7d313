"""The commands of the CD-ROM drive (*cat. 6.6*)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.devices.vioscsi import scsi
from vmd.devices.vioscsi.scsi import BLOCK, CHECK_CONDITION, GOOD, Drive, Reply

BLOCKS = 1000
INQUIRY = bytes.fromhex("058000021f000000") + b"OpenBSD VMM CD-ROM      001 "
CAPACITY_16 = bytes.fromhex("00000000000003e700000800") + bytes(20)
RECOVERY = bytes.fromhex("010a0005") + bytes(8)
CAPABILITIES = bytes.fromhex("2a1e08") + bytes(7) + bytes.fromhex("0002") + bytes(20)
TOC_TRACK = bytes.fromhex("0014010000000000")
TOC_OUT = bytes.fromhex("0014aa00000003e8")
CONFIGURATION = bytes.fromhex(
    "000000340000ffff"
    "00000304ffff0100"
    "000111080000000100000000"
    "0002070402000000"
    "0003030409000000"
    "001003080000080000100000"
)
CORE = CONFIGURATION[16:28]


def drive() -> Drive:
    """Return a drive with a disc of 1000 blocks."""
    return Drive(BLOCKS * BLOCK)


def refusal(reply: Reply) -> tuple[int, int]:
    """Return sense key and additional sense code of a reply, which must be well-formed."""
    assert reply.status == CHECK_CONDITION
    assert (len(reply.sense), reply.sense[0], reply.sense[7], reply.sense[13]) == (14, 0x70, 6, 0)
    assert not reply.data
    assert not reply.length
    return reply.sense[2], reply.sense[12]


# Command, whole answer, and position of the allocation length: first byte, number of bytes.
ANSWERS = {
    "inquiry": ("120000000000", INQUIRY, 3, 2),
    "request sense": ("030000000000", bytes.fromhex("700000000000000a").ljust(18, b"\0"), 4, 1),
    "mode sense(6) recovery": ("1a0001000000", bytes.fromhex("0f700000") + RECOVERY, 4, 1),
    "mode sense(6) capabilities": ("1a002a000000", bytes.fromhex("23700000") + CAPABILITIES, 4, 1),
    "mode sense(10) recovery": ("5a000100000000000000", bytes.fromhex("0012700000000000") + RECOVERY, 7, 2),
    "mode sense(10) capabilities": ("5a002a00000000000000", bytes.fromhex("0026700000000000") + CAPABILITIES, 7, 2),
    "read capacity(16)": ("9e10" + "00" * 14, CAPACITY_16, 10, 4),
    "toc from 0": ("43000000000000000000", bytes.fromhex("00120101") + TOC_TRACK + TOC_OUT, 7, 2),
    "toc from 1": ("43000000000001000000", bytes.fromhex("00120101") + TOC_TRACK + TOC_OUT, 7, 2),
    "toc lead-out": ("430000000000aa000000", bytes.fromhex("000a0101") + TOC_OUT, 7, 2),
    "toc msf": (
        "43020000000000000000",
        bytes.fromhex("00120101" "0014010000000200" "0014aa0000000f19"), 7, 2,
    ),
    "sessions": ("43000100000000000000", bytes.fromhex("000a0101") + TOC_TRACK, 7, 2),
    "sessions, as Linux asks": ("43000000000000000040", bytes.fromhex("000a0101") + TOC_TRACK, 7, 2),
    "events": ("4a010000040000000000", bytes.fromhex("0006021400020000"), 7, 2),
    "events of the disc": ("4a010000100000000000", bytes.fromhex("0006041400020000"), 7, 2),
    "events of both": ("4a010000140000000000", bytes.fromhex("0006021400020000"), 7, 2),
    "events of another class": ("4a010000400000000000", bytes.fromhex("00028014"), 7, 2),
    "configuration": ("46000000000000000000", CONFIGURATION, 7, 2),
    "configuration from core, current": (
        "46010001000000000000", bytes.fromhex("0000002c0000ffff") + CONFIGURATION[16:], 7, 2,
    ),
    "configuration of core": ("46020001000000000000", bytes.fromhex("000000100000ffff") + CORE, 7, 2),
    "configuration of nothing": ("46020123000000000000", bytes.fromhex("000000040000ffff"), 7, 2),
    "configuration of nothing in the upper byte": ("46020100000000000000", bytes.fromhex("000000040000ffff"), 7, 2),
    "configuration from behind the last": ("46000100000000000000", bytes.fromhex("000000040000ffff"), 7, 2),
    "mechanism status": ("bd" + "00" * 11, bytes(8), 8, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_cut_to_the_allocation_length(name: str) -> None:
    """A shorter length cuts the answer, and a longer one does not change it."""
    text, whole, at, width = ANSWERS[name]

    for allocated in (*range(len(whole) + 1), 255, 1 << 8 * (width - 1), (1 << 8 * width) - 1):
        cdb = bytearray.fromhex(text)
        cdb[at : at + width] = allocated.to_bytes(width, "big")
        assert drive().execute(bytes(cdb)) == Reply(data=whole[:allocated])


def test_configuration_has_the_length_of_vmds() -> None:
    """vmd's configuration has 56 bytes too."""
    assert len(CONFIGURATION) == 56


@pytest.mark.parametrize("text", ["000000000000", "1b0000000300", "1e0000000100"])
def test_command_without_data_is_good(text: str) -> None:
    """The commands are TEST UNIT READY, START STOP UNIT and PREVENT ALLOW."""
    assert drive().execute(bytes.fromhex(text)) == Reply(status=GOOD)


def test_report_luns_names_lun_0() -> None:
    """The list has one entry.  A length without room for it is refused."""
    full = bytes.fromhex("0000000800000000") + bytes(8)

    lengths = (15, 16, 99, 1 << 8, 1 << 16, 1 << 24)
    replies = {n: drive().execute(bytes.fromhex("a00000000000") + n.to_bytes(4, "big") + b"\0\0") for n in lengths}

    assert refusal(replies[15]) == (5, 0x24)
    assert all(reply == Reply(data=full) for n, reply in replies.items() if n > 15)


def test_read_capacity_10() -> None:
    """The answer has the last block and the block size."""
    assert drive().execute(b"\x25".ljust(10, b"\0")) == Reply(data=bytes.fromhex("000003e700000800"))


def test_capacity_beyond_32_bits() -> None:
    """READ CAPACITY(10) saturates.  READ CAPACITY(16) and the offset of a READ(16) are correct."""
    blocks = (1 << 32) + 5
    big = Drive(blocks * BLOCK)

    short = big.execute(b"\x25".ljust(10, b"\0"))
    long = big.execute(bytes.fromhex("9e10") + bytes(8) + bytes.fromhex("000000200000"))
    read = big.execute(b"\x88\0" + (blocks - 1).to_bytes(8, "big") + (1).to_bytes(4, "big") + b"\0\0")

    assert short.data == bytes.fromhex("ffffffff00000800")
    assert int.from_bytes(long.data[:8], "big") == blocks - 1
    assert (read.offset, read.length) == ((blocks - 1) * BLOCK, BLOCK)


def test_toc_addresses_saturate() -> None:
    """For a disc beyond the range of the fields, they have their largest value."""
    big = Drive(BLOCK << 33)

    assert big.execute(bytes.fromhex("430000000000aa000c00")).data[8:] == b"\xff\xff\xff\xff"
    assert big.execute(bytes.fromhex("430200000000aa000c00")).data[8:] == bytes((0, 255, 59, 74))


def read_cdb(opcode: int, lba: int, count: int) -> bytes:
    """Return the CDB of a READ command."""
    if opcode == 0x08:
        return bytes((8,)) + lba.to_bytes(3, "big") + bytes((count, 0))
    if opcode == 0x28:
        return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big") + b"\0"
    if opcode == 0xA8:
        return b"\xa8\0" + lba.to_bytes(4, "big") + count.to_bytes(4, "big") + b"\0\0"
    return b"\x88\0" + lba.to_bytes(8, "big") + count.to_bytes(4, "big") + b"\0\0"


READS = pytest.mark.parametrize("opcode", [0x08, 0x28, 0xA8, 0x88])


@READS
@pytest.mark.parametrize(("lba", "count"), [(0, 1), (7, 200), (BLOCKS - 1, 1), (BLOCKS - 255, 255)])
def test_read_returns_an_extent(opcode: int, lba: int, count: int) -> None:
    """Blocks have 2048 bytes."""
    assert drive().execute(read_cdb(opcode, lba, count)) == Reply(offset=lba * BLOCK, length=count * BLOCK)


@READS
@pytest.mark.parametrize(("lba", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (BLOCKS + 5, 0), (0x1FFFFF, 255)])
def test_read_beyond_the_disc_is_refused(opcode: int, lba: int, count: int) -> None:
    """The sense data is 5/21 for any block out of range."""
    assert refusal(drive().execute(read_cdb(opcode, lba, count))) == (5, 0x21)


WIDTHS = {0x08: (3, 1), 0x28: (4, 2), 0xA8: (4, 4), 0x88: (8, 4)}  # bytes of address and count


@READS
def test_each_byte_of_address_and_count(opcode: int) -> None:
    """The disc has 2^33 blocks.  READ(6) ignores the upper bits of its address, where SCSI-2 has the LUN."""
    big = Drive(BLOCK << 33)
    address_bytes, count_bytes = WIDTHS[opcode]
    for bit in range(8 * address_bytes):
        reply = big.execute(read_cdb(opcode, 1 << bit, 3))
        if opcode == 0x08 and bit > 20:
            assert reply == Reply(offset=0, length=3 * BLOCK)
        elif bit < 33:
            assert reply == Reply(offset=BLOCK << bit, length=3 * BLOCK)
        else:
            assert refusal(reply) == (5, 0x21)
    for bit in range(8 * count_bytes):
        reply = big.execute(read_cdb(opcode, 5, 1 << bit))
        if bit > 15:
            assert refusal(reply) == (5, 0x24)
        else:
            assert reply == Reply(offset=5 * BLOCK, length=BLOCK << bit)


def test_only_read_6_takes_0_blocks_as_256() -> None:
    """The other READ commands read nothing."""
    assert drive().execute(read_cdb(0x08, 0, 0)).length == 256 * BLOCK
    assert [drive().execute(read_cdb(op, 0, 0)) for op in (0x28, 0xA8, 0x88)] == [Reply()] * 3


def test_read_of_more_than_64_mib_is_refused() -> None:
    """64 MiB are accepted."""
    big = Drive(1 << 30)

    assert big.execute(read_cdb(0x28, 0, 32768)).length == 64 << 20
    assert refusal(big.execute(read_cdb(0x28, 0, 32769))) == (5, 0x24)
    assert refusal(big.execute(read_cdb(0xA8, 0, 32769))) == (5, 0x24)


@pytest.mark.parametrize(
    "text",
    [
        "1201000000ff", "1200800000ff",  # vital product data
        "030100001200",  # descriptor sense
        "1a003f00ff00", "1a006a00ff00", "1aaa2a01ff00", "5a00aa0000000000ff00", "5a000200000000000000",  # mode pages
        "9e120000000000000000000000200000",  # another service action
        "4300000000000200ff00", "4300020000000000ff00", "4300000000000000ff80",  # tracks and formats
        "4a0000000400000008ff",  # asynchronous events
        "4603000000000000ff00",  # request type
        "51000000000000002200",  # disc information
    ],
)  # fmt: skip
def test_field_out_of_range_is_refused(text: str) -> None:
    """The sense data is 5/24."""
    assert refusal(drive().execute(bytes.fromhex(text))) == (5, 0x24)


def test_unknown_opcodes_are_refused() -> None:
    """The sense data is 5/20 for each of them."""
    unknown = [opcode for opcode in range(256) if opcode not in Drive.COMMANDS]

    assert {refusal(drive().execute(bytes((opcode,)))) for opcode in unknown} == {(5, 0x20)}
    assert refusal(drive().execute(b"")) == (5, 0x20)


@pytest.mark.parametrize("size", [None, 0])
def test_drive_without_a_disc(size: int | None) -> None:
    """Commands that need a disc get 2/3A, and the others work."""
    empty = Drive(size)
    needs = [bytes((0,)), bytes((0x25,)), b"\x9e\x10", bytes((0x43,)), *(read_cdb(op, 0, 1) for op in (8, 0x28, 0x88))]

    assert {refusal(empty.execute(cdb)) for cdb in needs} == {(2, 0x3A)}
    assert empty.execute(bytes.fromhex("120000002400")).data == INQUIRY
    assert empty.execute(bytes.fromhex("030000001200")).data == bytes.fromhex("700002000000000a00000000 3a0000000000")


def test_lock_follows_the_last_command() -> None:
    """The power event is active while the drive is locked.  A second lock changes nothing."""
    one = drive()
    states = []
    for prevent in (1, 1, 0, 0):
        one.execute(bytes((0x1E, 0, 0, 0, prevent, 0)))
        states.append(one.execute(bytes.fromhex("4a010000040000000800")).data[5])

    assert states == [1, 1, 2, 2]


DISC_EVENT = bytes.fromhex("4a010000100000000800")
BOTH_EVENTS = bytes.fromhex("4a010000140000000800")
READY = bytes(6)
REQUEST_SENSE = bytes.fromhex("030000001200")


def test_a_new_disc_is_reported_once_in_each_way() -> None:
    """It is a unit attention for the first command that may fail, and the first event, of the media class."""
    one = drive()
    one.change(3 * BLOCK)

    for harmless in ("120000002400", "46000000000000000800", "a00000000000000000100000"):
        assert one.execute(bytes.fromhex(harmless)).status == GOOD
    assert one.execute(BOTH_EVENTS).data == bytes.fromhex("0006041402020000")
    assert one.execute(BOTH_EVENTS).data == bytes.fromhex("0006021400020000")
    assert one.execute(DISC_EVENT).data == bytes.fromhex("0006041400020000")
    assert refusal(one.execute(bytes.fromhex("25000000000000000000"))) == (6, 0x28)
    assert one.execute(READY).status == GOOD
    assert one.execute(bytes.fromhex("25000000000000000000")).data == bytes.fromhex("0000000200000800")


def test_request_sense_returns_the_unit_attention() -> None:
    """The driver gets it as data, and the next command succeeds."""
    one = drive()
    one.change(3 * BLOCK)

    assert one.execute(REQUEST_SENSE).data[2:13] == bytes.fromhex("06 00000000 0a 00000000 28")
    assert one.execute(READY).status == GOOD


def test_a_removed_disc_gives_not_ready_at_once() -> None:
    """This holds even if the driver has not noticed the disc before.  An empty drive has no unit attention."""
    one = drive()
    one.change(3 * BLOCK)
    one.change(None)

    assert refusal(one.execute(READY)) == (2, 0x3A)
    assert refusal(one.execute(bytes.fromhex("28000000000000000100"))) == (2, 0x3A)
    assert one.execute(DISC_EVENT).data == bytes.fromhex("0006041403000000")
    assert one.execute(DISC_EVENT).data == bytes.fromhex("0006041400000000")


def test_a_request_to_eject_is_an_event() -> None:
    """The disc and the lock stay."""
    one = drive()
    one.execute(bytes((0x1E, 0, 0, 0, 1, 0)))
    one.ask_to_eject()

    assert one.execute(DISC_EVENT).data == bytes.fromhex("0006041401020000")
    assert one.locked
    assert one.execute(READY).status == GOOD


@given(state=st.binary(max_size=8))
def test_unread_events_are_saved_and_restored(state: bytes) -> None:
    """Another drive gets them.  Random bytes, and the state of a later version, are no error."""
    one, other, third = drive(), drive(), drive()
    one.execute(bytes((0x1E, 0, 0, 0, 1, 0)))
    one.change(3 * BLOCK)
    other.restore(one.state())
    third.restore(state)

    for each in (other, third):
        assert len(each.execute(DISC_EVENT).data) == 8
    assert refusal(other.execute(READY)) == (6, 0x28)
    assert other.state() == bytes(3)


@given(
    opcode=st.one_of(st.sampled_from(sorted(Drive.COMMANDS)), st.integers(0, 255)),
    rest=st.binary(max_size=40),
    size=st.one_of(st.none(), st.integers(0, 1 << 45)),
)
def test_any_command_has_a_documented_reply(opcode: int, rest: bytes, size: int | None) -> None:
    """A reply has data, or an extent of the disc, or known sense data, and never two of them."""
    reply = Drive(size).execute(bytes((opcode,)) + rest)

    if reply.status == CHECK_CONDITION:
        known = {scsi.NO_MEDIUM, scsi.BAD_OPCODE, scsi.OUT_OF_RANGE, scsi.BAD_FIELD}
        assert refusal(reply) in known
    else:
        assert (reply.status, reply.sense) == (GOOD, b"")
        assert not (reply.data and reply.length)
        assert reply.offset + reply.length <= (size or 0)
        assert reply.length <= scsi.READ_MAX
        assert len(reply.data) <= 64
