"""Framing and checked decoding of messages (hostile-input 56, 57)."""

import contextlib
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import CODES, MESSAGES
from vmd.config.model import AllowInstance, BootDevice, DiskConfig, NicConfig, Owner, SeedConfig, VmConfig, VmFlag
from vmd.errors import PeerError
from vmd.ipc import first
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, decode, encode
from vmd.ipc.messages.clients import ANSWERS, REQUESTS, Caller, Failed, Ok, StartRequest, VmStarted, VmTerminated
from vmd.ipc.messages.vm import StartVm, StopVm
from vmd.ipc.routes import BY_CODE, Proc
from vmd.record import Record

CONFIG = VmConfig(
    name="db1",
    vcpus=2,
    kernel="/boot/\udcff.elf",  # a byte that is not UTF-8 survives
    boot_device=BootDevice.CDROM,
    given=VmFlag.KERNEL | VmFlag.DISK,
    disks=(DiskConfig(path="/a"), DiskConfig(path="/b", format="qcow2")),
    nics=(NicConfig(lladdr=b"\xfe\xe1\xbb\xd1\x00\x01", rdomain=3),),
    owner=Owner(uid=1000, gid=None),
    allow=AllowInstance(flags=VmFlag.DISK, owner=Owner(uid=5, gid=6)),
)
GONE = {0x6A, 0x91, 0x92}  # numbers of removed messages
START = StartRequest(caller=Caller(uid=1, gid=2, pid=3), name="db1", config=CONFIG)


def packet_of(message: Record) -> bytes:
    """Return the packet of a message without descriptors."""
    return encode(message)[0]


def test_round_trip_with_nested_records_and_fds() -> None:
    """A message comes back equal, with its header and its descriptors by name."""
    packet, order = encode(START, peerid=9, pid=77, fds={"initrd": [41], "kernel": [40]})

    envelope = decode(packet, order, "peer")

    assert envelope.message == START
    assert (envelope.peerid, envelope.pid) == (9, 77)
    assert order == [40, 41]
    assert envelope.take_fd("kernel") == 40
    assert envelope.take_fd("kernel") is None
    assert envelope.untaken() == [41]


def test_round_trip_by_name() -> None:
    """The same message with field names, including its records and descriptors."""
    packet, order = encode(START, peerid=9, pid=77, fds={"initrd": [41]}, form=Form.NAMED)

    envelope = decode(packet, order, "peer")

    assert envelope.message == START
    assert b"memory_bytes" in packet
    assert (envelope.take_fds("kernel"), envelope.take_fds("initrd")) == ([], [41])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ([{}, {"code": "1", "text": "a"}], "Failed.code: str is not int"),
        ([{}, {"code": 1}], "Failed: no text"),
        ([{}, [1, "a"]], "Failed: list has no fields"),
        ([{}, {"code": 1, "text": "a"}, 2], "has no fields"),
        ([{}], "has no fields"),
        ([{"tty": 1}, {"code": 1, "text": "a"}], "announces"),
        ([[], {"code": 1, "text": "a"}], "wrong number of fields"),
    ],
)
def test_broken_bodies_by_name_are_refused(fields: list[object], complaint: str) -> None:
    """Every field is checked as in the other form, and the two forms cannot be mixed."""
    with pytest.raises(PeerError, match=complaint):
        decode(body(0x31, fields, nfds=1 if complaint == "announces" else 0), [], "vmd")


def test_by_name_unknown_fields_are_ignored_and_missing_ones_have_defaults() -> None:
    """Programs of different versions understand each other because of this."""
    packet = body(0x34, [{"new": 0}, {"name": "a", "color": {"r": [1]}, "vmid": 1}])

    assert decode(packet, [], "vmd").message == VmTerminated(vmid=1, name="a", text="")


def test_descriptors_by_name_have_to_be_known() -> None:
    """An unknown one would stay open."""
    with pytest.raises(PeerError, match="counts name 0 descriptors, 1 came"):
        decode(body(0x31, [{"new": 1}, {"code": 1, "text": ""}], nfds=1), [5], "vmd")


def test_every_prefix_of_a_packet_by_name_is_refused() -> None:
    """This is as in the other form."""
    packet = encode(START, form=Form.NAMED)[0]
    for length in range(HEADER.size, len(packet)):
        cut = HEADER.pack(0x10, length, 0, 0, 0) + packet[HEADER.size : length]
        with pytest.raises(PeerError):
            decode(cut, [], "client")


def test_programs_of_protocol_1_get_known_fields_only() -> None:
    """They refuse a record with more fields than theirs, also inside of another record."""
    started = VmStarted(vmid=1, name="a", pid=2, tty="/dev/pts/0", notes=("odd",))
    now = encode(START, form=Form.FIRST)[0]
    disk = DiskConfig(path="/a", serial="x")
    then = encode(START.replace(config=CONFIG.replace(disks=(disk, CONFIG.disks[1]))), form=Form.FIRST)[0]

    assert msgpack.unpackb(encode(started, form=Form.FIRST)[0][HEADER.size :]) == [[], 1, "a", 2, "/dev/pts/0"]
    assert then == now


def test_programs_of_protocol_1_know_fewer_descriptors() -> None:
    """They neither get nor send later ones: a start has two, as in protocol 1."""
    seeded = START.replace(config=CONFIG.replace(seed=SeedConfig()))
    packet, _ = encode(StartRequest(name="a"), form=Form.FIRST)

    assert first.unknown_in(seeded) == "seed"
    assert first.unknown_in(START) == ""
    assert msgpack.unpackb(packet[HEADER.size :])[0] == [0, 0]
    envelope = decode(packet, [], "client")
    assert (envelope.message, envelope.fds["seed"]) == (StartRequest(name="a"), [])


def test_protocol_1_had_every_first_field_that_has_no_default() -> None:
    """Records grow at their end, by fields with defaults.  All fields of protocol 1 still exist, and are sufficient."""
    messages = {cls.__name__: cls for cls in (*REQUESTS, *ANSWERS)}
    for name, count in first.FIELDS.items():
        cls = messages.get(name)
        assert cls is None or cls.least <= count <= len(cls.fields), name


def test_no_number_is_used_again() -> None:
    """Otherwise an older vmm or vmctl would take one message for another.  Numbers of removed messages go to GONE."""
    assert GONE & set(BY_CODE) == set(), "these numbers belonged to removed messages"


def test_every_message_has_a_route_and_a_docstring() -> None:
    """The table has a sender and a receiver, and a meaning, for every message."""
    assert len(MESSAGES) > 30
    for info in MESSAGES:
        assert info.routes, info.cls
        assert info.cls.__doc__, info.cls
        assert all(isinstance(proc, Proc) for route in info.routes for proc in route)


@pytest.mark.parametrize(
    ("packet", "fds", "complaint"),
    [
        (b"", [], "no header"),
        (b"x" * 15, [], "no header"),
        (HEADER.pack(0x31, 99, 0, 0, 0), [], "header says 99 bytes"),
        (HEADER.pack(0xDEAD, 16, 0, 0, 0), [], "unknown message type 0xdead"),
        (HEADER.pack(0x36, 16, 1, 0, 0), [], "announces 1 descriptors, 0 came"),
        (packet_of(Ok()), [5], "announces 0 descriptors, 1 came"),
    ],
)
def test_broken_headers_are_refused(packet: bytes, fds: list[int], complaint: str) -> None:
    """Case 56: short packets, wrong lengths, unknown types and descriptor mismatches."""
    with pytest.raises(PeerError, match=complaint):
        decode(packet, fds, "client")


def body(code: int, fields: object, nfds: int = 0) -> bytes:
    """Return a packet with an arbitrary body."""
    raw: bytes = msgpack.packb(fields)
    return HEADER.pack(code, HEADER.size + len(raw), nfds, 0, 0) + raw


@pytest.mark.parametrize(
    ("packet", "fds", "complaint"),
    [
        (body(0x31, 5), [], "not a list"),
        (body(0x31, []), [], "not a list"),
        (body(0x31, [[], 1]), [], "wrong number of fields"),
        (body(0x31, [[], "1", "text"]), [], "Failed.code: str is not int"),
        (body(0x31, [[], True, "text"]), [], "Failed.code: bool is not int"),
        (body(0x31, [[], 1, None]), [], "NoneType is not str"),
        (body(0x31, [[1], 1, "text"]), [], "bad descriptor counts"),
        (body(0x63, [[], 1, 9]), [], "9 is not a valid StopMode"),
        (body(0x60, [[-1, 0, 0, 0, 0, 0, 0, 0, 0]]), [], "bad descriptor counts"),
        (body(0x60, [[0, 0, 0, 2, 0, 0, 0, 0, 0]], 2), [3, 4], "with 2 descriptors 'memory'"),
        (body(0x60, [[65, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]], 69), [*range(69)], "with 65 descriptors 'couriers"),
        (body(0x6C, [[], 1, True, "", "ab"]), [], "PauseDone.notes: str is not a list"),
        (body(0x6C, [[], 1, True, "", {"a": 1}]), [], "PauseDone.notes: dict is not a list"),
        (body(0x10, [[0, 0], None, 0, "a", None, "", {}, None]), [], "dict is not a number"),
    ],
)
def test_broken_bodies_are_refused(packet: bytes, fds: list[int], complaint: str) -> None:
    """Case 56: every field is checked against its declared type."""
    with pytest.raises(PeerError, match=complaint):
        decode(packet, fds, "client")


def test_fields_that_an_earlier_version_did_not_have_take_their_defaults() -> None:
    """New fields are appended with defaults, so messages of older programs are understood."""
    terminated = decode(body(0x34, [[], 1, "a"]), [], "vmd").message

    assert terminated == VmTerminated(vmid=1, name="a", text="")


def test_every_prefix_of_a_valid_packet_is_refused() -> None:
    """A truncated message is refused, even when its header has its length."""
    packet = packet_of(START)
    for length in range(HEADER.size, len(packet)):
        cut = HEADER.pack(0x10, length, 0, 0, 0) + packet[HEADER.size : length]
        with pytest.raises(PeerError):
            decode(cut, [], "client")


def test_bit_flips_raise_nothing_else() -> None:
    """A packet with one flipped bit is decoded to a checked message, or raises PeerError."""
    packet = packet_of(START)
    for bit in range(len(packet) * 8):
        broken = bytearray(packet)
        broken[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(PeerError):
            assert isinstance(decode(bytes(broken), [], "client").message, Record)


@given(st.binary(max_size=200), st.sampled_from(CODES))
def test_random_bodies_raise_nothing_else(data: bytes, code: int) -> None:
    """A body of random bytes raises PeerError only."""
    packet = HEADER.pack(code, HEADER.size + len(data), 0, 0, 0) + data
    with contextlib.suppress(PeerError):
        assert isinstance(decode(packet, [], "client").message, Record)


def test_deep_nesting_is_refused() -> None:
    """A body of thousands of nested lists raises PeerError, and the decoder does not crash."""
    data = b"\x91" * 16000
    packet = HEADER.pack(0x31, HEADER.size + len(data), 0, 0, 0) + data
    with pytest.raises(PeerError):
        decode(packet, [], "client")


@pytest.mark.parametrize("depth", [10, 900, 1000, 1010, 1020, 5000])
def test_nesting_among_the_descriptor_counts_is_refused(depth: int) -> None:
    """A body whose nesting can just be decoded does not crash the code of the error message."""
    data = b"\x91\x91" + b"\x91" * depth + b"\x01"
    with pytest.raises(PeerError):
        decode(HEADER.pack(0x13, HEADER.size + len(data), 0, 0, 0) + data, [], "client")


def test_a_message_that_does_not_fit_is_refused_on_sending() -> None:
    """A body larger than one packet raises ValueError at the sender."""
    with pytest.raises(ValueError, match=f"exceeds {MAX_MESSAGE}"):
        encode(Failed(code=1, text="x" * MAX_MESSAGE))


def test_descriptor_names_are_checked_on_sending() -> None:
    """A missing descriptor, or one that the message does not have, is our bug."""
    with pytest.raises(AssertionError):
        encode(StartVm(vmid=1, config=CONFIG, boot_name="k", verbosity=0))
    with pytest.raises(AssertionError):
        encode(StopVm(vmid=1, mode=0), fds={"tty": [1]})  # type: ignore[arg-type]


def test_random_packets_with_fixed_seed() -> None:
    """The packets are random, including their headers."""
    source = random.Random(20)
    for _ in range(3000):
        with pytest.raises(PeerError):
            decode(source.randbytes(source.randrange(64)), [], "client")
