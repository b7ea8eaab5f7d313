"""The DHCP and BOOTP server of a local interface: who is answered what (*cat. 7.3*, hostile input 42)."""

import random

import pytest

from tests.support.packets import (
    ACK,
    ALL4,
    ANY4,
    DECLINE,
    DISCOVER,
    GUEST4,
    HOST4,
    HOST_LLADDR,
    INFORM,
    LLADDR,
    NAK,
    OFFER,
    RELEASE,
    REQUEST,
    Answer,
    bootp,
    dhcp,
    ethernet,
    ipv4,
    option,
    request,
    udp,
)
from vmd.devices.vionet import dhcp as server
from vmd.devices.vionet.ethernet import checksum, sum_is_right
from vmd.devices.vionet.interface import Interface

NIC = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4)
OTHER4 = bytes((192, 168, 1, 9))
KIND = option(53, bytes((DISCOVER,)))


def ask(frame: bytes, nic: Interface = NIC, *, sum_missing: bool = False) -> Answer | None:
    """Return the answer to a frame."""
    reply = server.answer(frame, nic, sum_missing=sum_missing)
    if reply is None:
        return None
    answer = Answer(reply.frame)
    assert answer.kind == reply.kind
    return answer


def answered(frame: bytes, nic: Interface = NIC) -> Answer:
    """Return the answer, of which there must be one."""
    answer = ask(frame, nic)
    assert answer is not None
    return answer


# --- what is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        pytest.param(dhcp(DISCOVER), OFFER, id="discover"),
        pytest.param(dhcp(DISCOVER, requested=OTHER4), OFFER, id="discover-other"),
        pytest.param(dhcp(REQUEST), ACK, id="request"),
        pytest.param(dhcp(REQUEST, requested=GUEST4), ACK, id="request-ours"),
        pytest.param(dhcp(REQUEST, requested=OTHER4), NAK, id="request-other"),
        pytest.param(dhcp(REQUEST, ciaddr=GUEST4), ACK, id="rebind"),
        pytest.param(dhcp(REQUEST, ciaddr=OTHER4), NAK, id="rebind-other"),
        pytest.param(dhcp(REQUEST, ciaddr=OTHER4, requested=GUEST4), NAK, id="rebind-other-asks-ours"),
        pytest.param(dhcp(OFFER), NAK, id="offer"),
        pytest.param(dhcp(DECLINE, requested=GUEST4), NAK, id="decline"),
        pytest.param(dhcp(ACK), NAK, id="ack"),
        pytest.param(dhcp(NAK), NAK, id="nak"),
        pytest.param(dhcp(RELEASE), NAK, id="release"),
        pytest.param(dhcp(INFORM), NAK, id="inform"),
        pytest.param(dhcp(0), 0, id="type-0"),
        pytest.param(dhcp(99), NAK, id="unknown-type"),
        pytest.param(request(bootp(b"", cookie=b"")), 0, id="bootp-without-options"),
        pytest.param(request(bootp(b"\xff")), 0, id="bootp"),
    ],
)
def test_answer_by_type(frame: bytes, kind: int) -> None:
    """The truth table; whatever the answer, it names the guest's address and carries all options."""
    answer = answered(frame)

    assert answer.kind == kind
    assert answer.yiaddr == GUEST4
    assert answer.siaddr == HOST4
    assert {1, 3, 6} <= set(answer.options)
    assert ({51, 53, 54} <= set(answer.options)) == (kind != 0)


def test_unicast_renewal_is_answered() -> None:
    """It goes to the host's own addresses (unlike vmd, which lets it pass)."""
    options = option(53, bytes((REQUEST,))) + b"\xff"
    body = bootp(options, ciaddr=GUEST4)
    frame = ethernet(ipv4(udp(body, GUEST4, HOST4), 17, GUEST4, HOST4), 0x0800, LLADDR, HOST_LLADDR)

    answer = answered(frame)

    assert (answer.kind, answer.ciaddr, answer.yiaddr, answer.ip_destination) == (ACK, GUEST4, GUEST4, GUEST4)


def test_answer_byte_by_byte() -> None:
    """All fields of the headers, and the options in upstream's order."""
    answer = answered(dhcp(DISCOVER))

    assert answer.destination == LLADDR
    assert answer.source == LLADDR[:5] + b"\x04"
    assert (answer.tos, answer.id, answer.fragment, answer.ttl, answer.protocol) == (0x10, 0, 0, 16, 17)
    assert (answer.ip_source, answer.ip_destination, answer.ports) == (HOST4, GUEST4, [67, 68])
    assert (answer.op, answer.htype, answer.hlen, answer.hops, answer.xid) == (2, 1, 6, 0, 0x12345678)
    assert (answer.chaddr, answer.giaddr, answer.ciaddr) == (LLADDR + bytes(10), ANY4, ANY4)
    assert not any(answer.sname + answer.file)
    assert len(answer.body) >= 300
    assert list(answer.options.items()) == [
        (53, b"\x02"),
        (51, b"\xff\xff\xff\xff"),
        (54, HOST4),
        (1, bytes((255, 255, 255, 254))),
        (3, HOST4),
        (6, HOST4),
    ]


def test_source_address_wraps() -> None:
    """Its last byte is the guest's and one."""
    nic = NIC.replace(lladdr=LLADDR[:5] + b"\xff")
    body = bootp(KIND + b"\xff", chaddr=nic.lladdr)
    frame = ethernet(ipv4(udp(body, ANY4, ALL4), 17, ANY4, ALL4), 0x0800, nic.lladdr)

    assert answered(frame, nic).source == LLADDR[:5] + b"\x00"


def test_name_servers_mtu_and_boot_file() -> None:
    """As the operator and the host have them."""
    dns = (bytes((9, 9, 9, 9)), bytes((1, 1, 1, 1)))
    nic = NIC.replace(dns4=dns, mtu=9000, pxe=True, host_name="db1.example")

    answer = answered(dhcp(DISCOVER), nic)

    assert answer.options[6] == b"".join(dns)
    assert answer.options[12] == b"db1.example"
    assert answer.options[26] == (9000).to_bytes(2, "big")
    assert answer.file == b"auto_install".ljust(128, b"\0")
    assert list(answer.options) == [53, 51, 54, 1, 3, 6, 12, 26]


def test_usual_mtu_and_host_name_are_not_said_unasked() -> None:
    """A name is for guests that boot from the network."""
    answer = answered(dhcp(DISCOVER), NIC.replace(mtu=1500, host_name="db1"))

    assert not {12, 26} & set(answer.options)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True), ("db-1.example.org", True), ("9", True), ("x" * 63, True), ("", False), ("-a", False),
        ("a-", False), ("a..b", False), (".a", False), ("a_b", False), ("a b", False), ("a\nb", False), ("ä", False),
        ("x" * 64, False), (".".join(["x" * 63] * 4), True), (".".join(["x" * 63] * 5), False),
    ],
)  # fmt: skip
def test_host_name(name: str, valid: bool) -> None:
    """What is none is not sent (hostile input 42: 255 bytes, control characters)."""
    assert server.is_host_name(name) is valid

    answer = answered(dhcp(DISCOVER), NIC.replace(pxe=True, host_name=name))

    assert (12 in answer.options) is valid


def test_client_that_asks_for_a_broadcast_gets_one() -> None:
    """It has no address at which its stack would take the answer (RFC 2131, 4.1)."""
    assert answered(dhcp(DISCOVER, flags=0x8000)).ip_destination == ALL4
    assert answered(dhcp(DISCOVER, flags=0x8000)).flags == 0x8000
    assert answered(dhcp(REQUEST, requested=OTHER4)).ip_destination == ALL4


def test_requested_address_is_told() -> None:
    """For the record of the lease."""
    reply = server.answer(dhcp(REQUEST, requested=GUEST4), NIC)
    renewal = server.answer(dhcp(REQUEST, ciaddr=GUEST4), NIC)

    assert reply is not None
    assert renewal is not None
    assert (reply.requested, renewal.requested) == (GUEST4, GUEST4)


def test_unknown_options_and_padding_are_skipped() -> None:
    """Wherever they stand."""
    options = bytes(3) + option(61, b"\x01" + LLADDR) + bytes(1) + option(55, b"\1\3\6") + KIND + option(12, b"x" * 255)

    assert answered(request(bootp(options + b"\xff" + b"\x35\x01"))).kind == OFFER


def test_request_without_padding() -> None:
    """As short as one can be."""
    assert answered(request(bootp(KIND + b"\xff", size=0))).kind == OFFER
    assert answered(request(bootp(b"", size=0, cookie=b""))).kind == 0


def test_options_behind_the_end_do_not_count() -> None:
    """They are padding."""
    assert answered(request(bootp(KIND + b"\xff" + option(53, bytes((REQUEST,)))))).kind == OFFER


def test_options_without_end_42() -> None:
    """Hostile input 42: clients of old leave it out."""
    body = bootp(KIND, size=0)
    body += bytes(300 - len(body))

    assert answered(request(body)).kind == OFFER


# --- what is not -----------------------------------------------------------------------------------------------


def wrapped(body: bytes, **lies: object) -> bytes:
    """Return a frame with lies in its headers: those of `ipv4`, `udp_` those of `udp`, `eth_` those of `ethernet`."""
    of = {
        prefix: {name.removeprefix(prefix): lie for name, lie in lies.items() if name.startswith(prefix)}
        for prefix in ("udp_", "eth_")
    }
    own = {name: lie for name, lie in lies.items() if not name.startswith(("udp_", "eth_"))}
    source, destination = own.pop("source", ANY4), own.pop("destination", ALL4)
    protocol, kind = own.pop("protocol", 17), of["eth_"].pop("kind", 0x0800)
    datagram = udp(body, source, destination, **of["udp_"])  # type: ignore[arg-type]
    packet = ipv4(datagram, protocol, source, destination, **own)  # type: ignore[arg-type]
    return ethernet(packet, kind, **of["eth_"])  # type: ignore[arg-type]


GOOD = bootp(KIND + b"\xff")
PASSED = {
    "short-frame": wrapped(bootp(b"", size=0, cookie=b"")[:-1]),
    "long-frame": wrapped(bootp(KIND + b"\xff", size=1500)),
    "other-type": wrapped(GOOD, eth_kind=0x0806),
    "to-another": wrapped(GOOD, eth_destination=LLADDR),
    "from-another": wrapped(GOOD, eth_source=HOST_LLADDR),
    "version-6": wrapped(GOOD, first=0x65),
    "ip-header-of-16": wrapped(GOOD, first=0x44),
    "ip-header-longer-than-packet": wrapped(GOOD, first=0x4F),
    "ip-sum": wrapped(GOOD, right_sum=False),
    "ip-total-too-long": wrapped(GOOD, total=2000),
    "ip-total-too-short": wrapped(GOOD, total=20),
    "more-fragments": wrapped(GOOD, fragment=0x2000),
    "fragment-offset": wrapped(GOOD, fragment=1),
    "tcp": wrapped(GOOD, protocol=6),
    "to-another-address": wrapped(GOOD, destination=OTHER4),
    "from-port": wrapped(GOOD, udp_ports=(67, 67)),
    "to-port": wrapped(GOOD, udp_ports=(68, 68)),
    "udp-sum": wrapped(GOOD, udp_kind="wrong"),
    "udp-sum-left-to-the-device": wrapped(GOOD, udp_kind="pseudo"),
    "udp-length-too-long": wrapped(GOOD, udp_length=1000),
    "udp-length-too-short": wrapped(GOOD, udp_length=7),
    "udp-length-of-nothing": wrapped(GOOD, udp_length=8, udp_kind="none"),
    "reply": wrapped(bootp(KIND + b"\xff", op=2)),
    "token-ring": wrapped(bootp(KIND + b"\xff", htype=6)),
    "hlen-0": wrapped(bootp(KIND + b"\xff", hlen=0)),
    "hlen-17": wrapped(bootp(KIND + b"\xff", hlen=17)),
    "hlen-255": wrapped(bootp(KIND + b"\xff", hlen=255)),
    "hops": wrapped(bootp(KIND + b"\xff", hops=1)),
    "relayed": wrapped(bootp(KIND + b"\xff", giaddr=OTHER4)),
    "another-client": wrapped(bootp(KIND + b"\xff", chaddr=HOST_LLADDR)),
    "wants-a-file": wrapped(bootp(KIND + b"\xff", file=b"x")),
    "discover-with-address": wrapped(bootp(KIND + b"\xff", ciaddr=GUEST4)),
    "inform-with-address": wrapped(bootp(option(53, bytes((INFORM,))) + b"\xff", ciaddr=GUEST4)),
    "release-with-address": wrapped(bootp(option(53, bytes((RELEASE,))) + b"\xff", ciaddr=GUEST4)),
    "option-past-the-end": wrapped(bootp(KIND + b"\x0c\xff", size=0) + bytes(50)),
    "option-without-length": wrapped(bootp(KIND + bytes(60) + b"\x0c", size=0)),
    "empty-type": wrapped(bootp(option(53, b"") + b"\xff")),
    "type-of-two": wrapped(bootp(option(53, b"\1\1") + b"\xff")),
    "type-twice": wrapped(bootp(KIND + KIND + b"\xff")),
    "address-of-three": wrapped(bootp(KIND + option(50, b"abc") + b"\xff")),
    "address-of-255": wrapped(bootp(KIND + option(50, b"a" * 255) + b"\xff")),
}


@pytest.mark.parametrize("frame", PASSED.values(), ids=PASSED)
def test_frame_that_is_not_for_us_42(frame: bytes) -> None:
    """Hostile input 42: it goes on to the network."""
    assert ask(frame) is None


def test_what_is_wrong_is_all_that_is_wrong() -> None:
    """The frame from which those above are made is answered; so are those with what is allowed."""
    for lies in (
        {}, {"udp_kind": "none"}, {"destination": HOST4}, {"eth_destination": HOST_LLADDR},
        {"first": 0x46, "options": b"\1" * 4},
    ):  # fmt: skip
        assert ask(wrapped(GOOD, **lies)) is not None
    assert ask(wrapped(GOOD) + bytes(20)) is not None  # padding of the link


def test_sum_that_was_left_to_the_device() -> None:
    """A guest with CSUM sends the pseudo header's."""
    assert ask(wrapped(GOOD, udp_kind="pseudo"), sum_missing=True) is not None


def test_host_without_link_layer_address_answers_broadcasts_only() -> None:
    """As long as nobody has told it."""
    nic = NIC.replace(host_lladdr=b"")

    assert ask(dhcp(DISCOVER), nic) is not None
    assert ask(wrapped(GOOD, eth_destination=HOST_LLADDR), nic) is None


# --- anything ----------------------------------------------------------------------------------------------------

SAMPLES = [
    dhcp(DISCOVER, more=option(61, b"\x01" + LLADDR)),
    dhcp(REQUEST, requested=GUEST4),
    dhcp(REQUEST, ciaddr=GUEST4),
    request(bootp(b"", cookie=b"")),
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_prefix_is_judged(sample: bytes) -> None:
    """Nothing that is cut off is answered: its lengths or sums are wrong."""
    for length in range(len(sample)):
        assert ask(sample[:length]) is None


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_flipped_bit_is_judged(sample: bytes) -> None:
    """Nothing that was changed on its way is answered."""
    for bit in range(len(sample) * 8):
        flipped = bytearray(sample)
        flipped[bit // 8] ^= 1 << bit % 8
        assert ask(bytes(flipped)) is None


def test_random_bodies() -> None:
    """Of right sums, with everything behind them made up (fixed seed)."""
    choice = random.Random(42)
    kinds = set()
    for _ in range(20_000):
        body = bytearray(SAMPLES[choice.randrange(4)][42:])
        for _ in range(choice.randrange(1, 8)):
            body[choice.randrange(len(body))] = choice.randrange(256)
        body = body[: choice.randrange(272, len(body) + 1)] + choice.randbytes(choice.choice((0, 0, 7, 300)))
        answer = ask(wrapped(bytes(body), udp_kind="none"))
        kinds.add(answer.kind if answer is not None else None)
    assert {None, 0, OFFER, ACK, NAK} <= kinds


def test_random_frames() -> None:
    """Of nothing but noise (fixed seed)."""
    choice = random.Random(43)
    for _ in range(5000):
        assert ask(choice.randbytes(choice.randrange(1600))) is None


def test_sums() -> None:
    """Of odd and even lengths, of nothing but zeroes, and of what adds up to zero."""
    choice = random.Random(44)
    for _ in range(2000):
        data = choice.randbytes(2 * choice.randrange(1, 100))
        total = checksum(data)
        assert 0 <= total <= 0xFFFF
        assert sum_is_right(data + total.to_bytes(2, "big"))
        assert not sum_is_right(data + (total ^ 1 << choice.randrange(16)).to_bytes(2, "big"))
    assert checksum(b"\xff\xff") == 0
    assert checksum(b"\x01") == checksum(b"\x01\x00")
