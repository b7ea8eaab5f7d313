"""The DHCP and BOOTP server of a local interface, and its answers (*cat. 7.3*, hostile input 42)."""

import random
import socket

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
from vmd.config import rules
from vmd.devices.vionet import dhcp as server
from vmd.devices.vionet.ethernet import checksum, sum_is_right
from vmd.devices.vionet.interface import Interface

NIC = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4)
OTHER4 = bytes((192, 168, 1, 9))
KIND = option(53, bytes((DISCOVER,)))


def ask(frame: bytes, nic: Interface = NIC, *, sum_missing: bool = False) -> Answer | None:
    """Return the answer to a frame, if there is one."""
    try:
        reply = server.answer(frame, nic, sum_missing=sum_missing)
    except server.Unanswered:
        return None
    if reply is None:
        return None
    answer = Answer(reply.frame)
    assert answer.kind == reply.kind
    return answer


def outcome(frame: bytes, nic: Interface = NIC) -> int | str | None:
    """Return the type of the answer, or the reason why there is none.  None: the frame is no DHCP."""
    try:
        reply = server.answer(frame, nic)
    except server.Unanswered as unanswered:
        return unanswered.reason
    return reply if reply is None else reply.kind


def answered(frame: bytes, nic: Interface = NIC) -> Answer:
    """Return the answer to a frame, which must exist."""
    answer = ask(frame, nic)
    assert answer is not None
    return answer


# --- answers -------------------------------------------------------------------------------------------------------


OTHER_HOST4 = bytes((192, 168, 1, 1))
SAYS: dict[str, int | str] = {
    "O": OFFER, "A": ACK, "N": NAK, "B": server.BOOTP_TYPE, "o": server.OTHER_ADDRESS, "s": server.OTHER_SERVER,
    "d": server.DECLINED, "r": server.RELEASED, "a": server.NO_ADDRESS, "?": server.UNKNOWN_TYPE,
}  # fmt: skip
# RFC 2131, table 4 and 4.3.  Each row is for a type and a server identifier (none, ours, another).  It has a group for
# each ciaddr (none, the guest's, another) with the answers to each requested address (none, the guest's, another).
NONE, ONE, NONE_OR_ONE = (None,), (HOST4,), (None, HOST4)
ANY = (None, HOST4, OTHER_HOST4)
TABLE: tuple[tuple[int | None, tuple[bytes | None, ...], str], ...] = (
    (DISCOVER, ANY, "OOO OOO OOO"),  # the requested address is only a wish
    (REQUEST, NONE_OR_ONE, "AAN AAN NNN"),  # selecting, init-reboot, renewing, rebinding
    (REQUEST, (OTHER_HOST4,), "sss sss sss"),  # 4.3.2: the client declines our offer in this way
    (DECLINE, NONE_OR_ONE, "ddo ddo ooo"),
    (DECLINE, (OTHER_HOST4,), "sss sss sss"),
    (RELEASE, NONE_OR_ONE, "rro rro ooo"),
    (RELEASE, (OTHER_HOST4,), "sss sss sss"),
    (INFORM, ANY, "aaa AAA AAA"),  # 4.3.5: with any ciaddr
    (None, ANY, "BBB BBB ooo"),  # BOOTP does not have these options
    *((kind, ANY, "??? ??? ???") for kind in (0, OFFER, ACK, NAK, 9, 13, 99, 255)),
)


def test_answer_by_type_ciaddr_requested_address_and_server() -> None:
    """Every combination gets its answer, with all required fields and options and no others (RFC 2131, table 3)."""
    combinations = 0
    for kind, servers, row in TABLE:
        for server_id, (ciaddr, says), wanted in (
            (server_id, group, wanted)
            for server_id in servers
            for group in zip((ANY4, GUEST4, OTHER4), row.split(), strict=True)
            for wanted in range(3)
        ):
            combinations += 1
            requested = (b"", GUEST4, OTHER4)[wanted]
            options = b"" if kind is None else option(53, bytes((kind,)))
            options += option(50, requested) if requested else b""
            options += b"" if server_id is None else option(54, server_id)
            frame = request(bootp(options + b"\xff", ciaddr=ciaddr))
            case = (kind, ciaddr, requested, server_id)

            assert outcome(frame) == SAYS[says[wanted]], case

            answer = ask(frame)
            if answer is None:
                continue
            gives = answer.kind != NAK
            assert answer.yiaddr == (GUEST4 if gives and kind != INFORM else ANY4), case
            assert answer.siaddr == (HOST4 if gives else ANY4), case
            assert answer.ciaddr == (ciaddr if answer.kind in (ACK, 0) else ANY4), case
            assert ({1, 3, 6} <= set(answer.options)) == gives, case
            assert (51 in answer.options) == (answer.kind in (OFFER, ACK) and kind != INFORM), case
            assert (answer.options.get(54) == HOST4) == (kind is not None), case
            assert (56 in answer.options) == (not gives), case
            if not gives:
                assert answer.ip_destination == ALL4, case
            elif ciaddr != ANY4:
                assert answer.ip_destination == ciaddr, case
            else:
                assert answer.ip_destination == GUEST4, case
    assert combinations == 9 * (3 + 3 * 3 + 3 + 3 + 8 * 3)


def test_inform_of_a_client_whose_address_is_only_the_sender() -> None:
    """Some Windows clients leave ciaddr empty, and send the packet from their address."""
    body = bootp(option(53, bytes((INFORM,))) + b"\xff")
    answer = answered(ethernet(ipv4(udp(body, OTHER4, ALL4), 17, OTHER4, ALL4), 0x0800))

    assert (answer.kind, answer.yiaddr, answer.ip_destination) == (ACK, ANY4, OTHER4)


def test_only_an_address_that_is_given_counts_as_a_lease() -> None:
    """INFORM is acknowledged too, but that gives no address."""
    replies = [server.answer(frame, NIC) for frame in (
        dhcp(REQUEST), request(bootp(b"\xff")), dhcp(DISCOVER), dhcp(REQUEST, requested=OTHER4),
        dhcp(INFORM, ciaddr=GUEST4),
    )]  # fmt: skip

    assert [reply is not None and reply.lease for reply in replies] == [True, True, False, False, False]


# --- options that come in parts, and identifiers (RFC 3396, RFC 6842) ------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"), [(DISCOVER, b""), (REQUEST, b""), (REQUEST, option(50, OTHER4)), (INFORM, b"")]
)
@pytest.mark.parametrize("identifier", [b"\x01" + LLADDR, b"\xff" + bytes(18), b"\0", b"x" * 200], ids=len)
def test_client_identifier_is_in_every_answer(kind: int, more: bytes, identifier: bytes) -> None:
    """Every DHCP answer has it, also NAK (RFC 6842, 3)."""
    ciaddr = GUEST4 if kind == INFORM else ANY4

    assert answered(dhcp(kind, more=more + option(61, identifier), ciaddr=ciaddr)).options[61] == identifier
    assert 61 not in answered(dhcp(kind, more=more, ciaddr=ciaddr)).options


def test_options_in_parts_are_put_together() -> None:
    """Adjacent or not, the parts of any option are joined.  Long options of answers are split (RFC 3396, 7)."""
    address = option(50, GUEST4[:1]) + option(12, b"x") + option(50, GUEST4[1:])
    identifier = bytes(range(256)) + b"end"
    parts = option(61, identifier[:255]) + option(61, identifier[255:])

    assert outcome(dhcp(REQUEST, more=address)) == ACK
    assert outcome(dhcp(REQUEST, more=option(50, OTHER4[:2]) + option(50, OTHER4[2:]))) == NAK
    raw = server.answer(dhcp(REQUEST, more=option(57, (1400).to_bytes(2, "big")) + parts), NIC)
    assert raw is not None
    assert option(61, identifier[:255]) + option(61, identifier[255:]) + b"\xff" in raw.frame


def test_options_in_the_file_and_sname_fields() -> None:
    """With option overload, `options` comes first, then `file`, then `sname` (RFC 3396, 5)."""
    for overload, file, sname, kind in (
        (1, option(54, OTHER_HOST4) + b"\xff", b"", server.OTHER_SERVER),
        (2, b"", option(54, OTHER_HOST4) + b"\xff", server.OTHER_SERVER),
        (3, option(50, OTHER4[:1]) + b"\xff", option(50, OTHER4[1:]) + b"\xff", NAK),
        (3, bytes(128), bytes(64), ACK),
        (2, option(54, OTHER_HOST4), b"", ACK),
    ):
        body = bytearray(bootp(option(53, bytes((REQUEST,))) + option(52, bytes((overload,))) + b"\xff"))
        body[44 : 44 + len(sname)] = sname
        body[108 : 108 + len(file)] = file
        assert outcome(request(bytes(body))) == kind, (overload, file, sname)
    cut = bytearray(bootp(option(53, bytes((REQUEST,))) + option(52, b"\x01") + b"\xff"))
    cut[108 + 126 : 108 + 128] = b"\x0c\x01"
    cut[108:234] = option(12, b"x" * 124)
    assert outcome(request(bytes(cut))) == server.MALFORMED


def test_an_answer_that_is_too_long_for_the_client_is_not_sent() -> None:
    """An identifier of 400 bytes needs more than the 576 bytes that every client accepts.  Option 57 may allow more."""
    identifier = option(61, b"i" * 200) * 2

    assert outcome(dhcp(DISCOVER, more=identifier)) == server.TOO_LONG
    assert outcome(dhcp(DISCOVER, more=identifier + option(57, (1000).to_bytes(2, "big")))) == OFFER
    large = option(57, b"\xff\xff")
    assert outcome(dhcp(DISCOVER, more=option(61, b"i" * 255) * 4 + large, size=0)) == OFFER
    most = option(61, b"i" * 255) * 4 + option(61, b"i" * 190)
    assert outcome(dhcp(DISCOVER, more=most + large, size=0)) == server.TOO_LONG  # it does not fit into a frame


def test_unicast_renewal_is_answered() -> None:
    """The request goes to the host's own addresses (unlike vmd, which does not answer it)."""
    options = option(53, bytes((REQUEST,))) + b"\xff"
    body = bootp(options, ciaddr=GUEST4)
    frame = ethernet(ipv4(udp(body, GUEST4, HOST4), 17, GUEST4, HOST4), 0x0800, LLADDR, HOST_LLADDR)

    answer = answered(frame)

    assert (answer.kind, answer.ciaddr, answer.yiaddr, answer.ip_destination) == (ACK, GUEST4, GUEST4, GUEST4)


def test_answer_byte_by_byte() -> None:
    """All fields of the headers have their values, and the options have upstream's order."""
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
    """Its last byte is the guest's plus one."""
    nic = NIC.replace(lladdr=LLADDR[:5] + b"\xff")
    body = bootp(KIND + b"\xff", chaddr=nic.lladdr)
    frame = ethernet(ipv4(udp(body, ANY4, ALL4), 17, ANY4, ALL4), 0x0800, nic.lladdr)

    assert answered(frame, nic).source == LLADDR[:5] + b"\x00"


def test_name_servers_mtu_and_boot_file() -> None:
    """They come from the configuration and from the host."""
    dns = (bytes((9, 9, 9, 9)), bytes((1, 1, 1, 1)))
    nic = NIC.replace(dns4=dns, mtu=9000, pxe=True, host_name="db1.example")

    answer = answered(dhcp(DISCOVER), nic)

    assert answer.options[6] == b"".join(dns)
    assert (answer.options[12], answer.options[15]) == (b"db1", b"example")
    assert answer.options[26] == (9000).to_bytes(2, "big")
    assert answer.file == b"auto_install".ljust(128, b"\0")
    assert list(answer.options) == [53, 51, 54, 1, 3, 6, 12, 15, 26]


def test_default_values_are_not_sent() -> None:
    """An MTU of 1500 is not sent, nor a domain if there is none.  Every guest gets its name."""
    answer = answered(dhcp(DISCOVER), NIC.replace(mtu=1500, host_name="db1"))

    assert answer.options[12] == b"db1"
    assert not {15, 26} & set(answer.options)


def test_a_name_without_room_is_left_out() -> None:
    """A guest with a long identifier still gets its address.  If it accepts longer answers, it also gets its name."""
    nic = NIC.replace(host_name=f"{'x' * 60}.{'y' * 60}")
    identifier = option(61, b"i" * 200)

    for more, name in ((b"", None), (option(57, (1000).to_bytes(2, "big")), b"x" * 60)):
        answer = answered(dhcp(DISCOVER, more=identifier + more), nic)
        assert (answer.options.get(12), answer.options.get(15) is None) == (name, name is None)
        assert (answer.kind, answer.options[61]) == (OFFER, b"i" * 200)


@pytest.mark.parametrize(
    ("length4", "mask"), [(31, "255.255.255.254"), (30, "255.255.255.252"), (24, "255.255.255.0"), (16, "255.255.0.0")]
)
def test_the_mask_is_that_of_the_network(length4: int, mask: str) -> None:
    """The network has only guest and host, or is larger."""
    answer = answered(dhcp(DISCOVER), NIC.replace(length4=length4))

    assert socket.inet_ntoa(answer.options[1]) == mask


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({12: b"web"}, b"web"),
        ({12: b"web.example.org."}, b"web.example.org"),
        ({12: b"web\0"}, b"web"),
        ({81: b"\0\0\0web.example.org"}, b"web.example.org"),
        ({81: b"\1\0\0web"}, b"web"),  # with the other flags (RFC 4702, 2.1)
        ({81: b"\12\0\0web"}, b"web"),
        ({81: b"\0\0\0"}, b""),
        ({81: b"\4\0\0\3web\7example\0"}, b"web.example"),
        ({81: b"\4\0\0\3web"}, b"web"),
        ({81: b"\4\0\0\77we"}, b""),
        ({81: b"\0\0"}, b""),
        ({12: b"db1", 81: b"\0\0\0web"}, b"db1"),
        ({12: b"x" * 63 + b".y"}, b""),  # too long for the figures
        ({12: b"x" * 62 + b".y"}, b"x" * 62 + b".y"),
        ({12: b"a\nb"}, b""),
        ({12: b"\xe4"}, b""),
        ({}, b""),
    ],
)
def test_the_name_that_a_client_sends(options: dict[int, bytes], name: bytes) -> None:
    """Either option has it (RFC 2132, 3.14; RFC 4702).  An impossible host name is ignored."""
    assert server.name_in(options) == name


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True), ("db-1.example.org", True), ("9", True), ("x" * 63, True), ("", False), ("-a", False),
        ("a-", False), ("a..b", False), (".a", False), ("a_b", False), ("a b", False), ("a\nb", False), ("ä", False),
        ("x" * 64, False), (".".join(["x" * 63] * 4), True), (".".join(["x" * 63] * 5), False),
    ],
)  # fmt: skip
def test_host_name(name: str, valid: bool) -> None:
    """An impossible host name is not sent (hostile input 42: 255 bytes, control characters)."""
    assert server.is_host_name(name) is rules.is_host_name(name) is valid

    answer = answered(dhcp(DISCOVER), NIC.replace(pxe=True, host_name=name))

    assert (12 in answer.options) is valid


def test_client_that_asks_for_a_broadcast_gets_one() -> None:
    """Its network stack has no address to receive the answer (RFC 2131, 4.1)."""
    assert answered(dhcp(DISCOVER, flags=0x8000)).ip_destination == ALL4
    assert answered(dhcp(DISCOVER, flags=0x8000)).flags == 0x8000
    assert answered(dhcp(REQUEST, requested=OTHER4)).ip_destination == ALL4


def test_requested_address_is_reported() -> None:
    """It is for the record of the lease."""
    reply = server.answer(dhcp(REQUEST, requested=GUEST4), NIC)
    renewal = server.answer(dhcp(REQUEST, ciaddr=GUEST4), NIC)

    assert reply is not None
    assert renewal is not None
    assert (reply.requested, renewal.requested) == (GUEST4, GUEST4)


def test_unknown_options_and_padding_are_skipped() -> None:
    """They may be at any place."""
    options = bytes(3) + option(61, b"\x01" + LLADDR) + bytes(1) + option(55, b"\1\3\6") + KIND + option(12, b"x" * 255)

    assert answered(request(bootp(options + b"\xff" + b"\x35\x01"))).kind == OFFER


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (KIND + b"\x0c\0", OFFER), (KIND, OFFER), (KIND + b"\x0c\1x", OFFER), (KIND + b"\x0c", server.MALFORMED),
        (KIND + b"\x0c\1", server.MALFORMED), (KIND + b"\x0c\2x", server.MALFORMED),
        (b"\0" + option(53, bytes((REQUEST,))) + b"\0" + option(50, OTHER4), NAK),
        (b"\0\0" + option(53, bytes((REQUEST,))) + b"\0\0\0" + option(50, GUEST4), ACK),
    ],
)  # fmt: skip
def test_options_up_to_the_last_byte(options: bytes, kind: int | str) -> None:
    """An option may end where its field ends, and may be empty.  Padding is one byte."""
    assert outcome(request(bootp(options, size=0))) == kind


def test_length_of_an_answer() -> None:
    """It has the 300 bytes that old clients want, and is never longer than the client accepts or a frame can be.

    The host name is in each answer that has room for it.
    """
    assert len(answered(dhcp(DISCOVER)).body) == 300
    nic = NIC.replace(host_name=f"{'x' * 60}.{'y' * 60}")
    identifier = option(61, b"i" * 200)
    named, plain = (answered(dhcp(DISCOVER, more=identifier + option(57, b"\x05\xdc")), each) for each in (nic, NIC))
    assert (12 in named.options, 12 in plain.options) == (True, False)
    for limit in (named.total - 1, named.total):
        answer = answered(dhcp(DISCOVER, more=identifier + option(57, limit.to_bytes(2, "big"))), nic)
        assert answer.total == (named.total if limit == named.total else plain.total)
    lengths = [
        len(found.frame) for count in range(160, 200)
        if (found := ask(dhcp(DISCOVER, more=option(61, b"i" * 255) * 4 + option(61, b"i" * count)
                               + option(57, b"\xff\xff"), size=0)))
    ]  # fmt: skip
    assert max(lengths) == 1514
    assert len(lengths) < 40


def test_request_without_padding() -> None:
    """The request is as short as possible."""
    assert answered(request(bootp(KIND + b"\xff", size=0))).kind == OFFER
    assert answered(request(bootp(b"", size=0, cookie=b""))).kind == 0


def test_options_after_the_end_are_ignored() -> None:
    """Bytes after the end option are padding."""
    assert answered(request(bootp(KIND + b"\xff" + option(53, bytes((REQUEST,)))))).kind == OFFER


def test_options_without_end_42() -> None:
    """Hostile input 42: old clients send no end option."""
    body = bootp(KIND, size=0)
    body += bytes(300 - len(body))

    assert answered(request(body)).kind == OFFER


# --- no answer -------------------------------------------------------------------------------------------------


def wrapped(body: bytes, **changes: object) -> bytes:
    """Return a frame with other values in its headers: `udp_…` for `udp`, `eth_…` for `ethernet`, else for `ipv4`."""
    of = {
        prefix: {name.removeprefix(prefix): value for name, value in changes.items() if name.startswith(prefix)}
        for prefix in ("udp_", "eth_")
    }
    own = {name: value for name, value in changes.items() if not name.startswith(("udp_", "eth_"))}
    source, destination = own.pop("source", ANY4), own.pop("destination", ALL4)
    protocol, kind = own.pop("protocol", 17), of["eth_"].pop("kind", 0x0800)
    datagram = udp(body, source, destination, **of["udp_"])  # type: ignore[arg-type]
    packet = ipv4(datagram, protocol, source, destination, **own)  # type: ignore[arg-type]
    return ethernet(packet, kind, **of["eth_"])  # type: ignore[arg-type]


GOOD = bootp(KIND + b"\xff")
PASSED = {
    "short-frame": (server.MALFORMED, wrapped(bootp(b"", size=0, cookie=b"")[:-1])),
    "long-frame": (None, wrapped(bootp(KIND + b"\xff", size=1500))),
    "other-type": (None, wrapped(GOOD, eth_kind=0x0806)),
    "to-another": (None, wrapped(GOOD, eth_destination=LLADDR)),
    "from-another": (server.OTHER_CLIENT, wrapped(GOOD, eth_source=HOST_LLADDR)),
    "version-6": (None, wrapped(GOOD, first=0x65)),
    "ip-header-of-16": (None, wrapped(GOOD, first=0x44)),
    "ip-header-longer-than-packet": (None, wrapped(GOOD, first=0x4F)),
    "ip-sum": (server.MALFORMED, wrapped(GOOD, right_sum=False)),
    "ip-total-too-long": (server.MALFORMED, wrapped(GOOD, total=2000)),
    "ip-total-too-short": (server.MALFORMED, wrapped(GOOD, total=20)),
    "more-fragments": (None, wrapped(GOOD, fragment=0x2000)),
    "fragment-offset": (None, wrapped(GOOD, fragment=1)),
    "tcp": (None, wrapped(GOOD, protocol=6)),
    "to-another-address": (server.OTHER_SERVER, wrapped(GOOD, destination=OTHER4)),
    "from-port": (None, wrapped(GOOD, udp_ports=(67, 67))),
    "to-port": (None, wrapped(GOOD, udp_ports=(68, 68))),
    "udp-sum": (server.MALFORMED, wrapped(GOOD, udp_kind="wrong")),
    "udp-sum-left-to-the-device": (server.MALFORMED, wrapped(GOOD, udp_kind="pseudo")),
    "udp-length-too-long": (server.MALFORMED, wrapped(GOOD, udp_length=1000)),
    "udp-length-too-short": (server.MALFORMED, wrapped(GOOD, udp_length=7)),
    "udp-length-of-nothing": (server.MALFORMED, wrapped(GOOD, udp_length=8, udp_kind="none")),
    "reply": (server.MALFORMED, wrapped(bootp(KIND + b"\xff", op=2))),
    "token-ring": (server.MALFORMED, wrapped(bootp(KIND + b"\xff", htype=6))),
    "hlen-0": (server.MALFORMED, wrapped(bootp(KIND + b"\xff", hlen=0))),
    "hlen-17": (server.MALFORMED, wrapped(bootp(KIND + b"\xff", hlen=17))),
    "hlen-255": (server.MALFORMED, wrapped(bootp(KIND + b"\xff", hlen=255))),
    "hops": (server.RELAYED, wrapped(bootp(KIND + b"\xff", hops=1))),
    "relayed": (server.RELAYED, wrapped(bootp(KIND + b"\xff", giaddr=OTHER4))),
    "another-client": (server.OTHER_CLIENT, wrapped(bootp(KIND + b"\xff", chaddr=HOST_LLADDR))),
    "bootp-for-a-file": (server.WANTS_FILE, wrapped(bootp(b"\xff", file=b"x"))),
    "overload-of-two": (server.MALFORMED, wrapped(bootp(KIND + option(52, b"\1\1") + b"\xff"))),
    "server-of-five": (server.MALFORMED, wrapped(bootp(KIND + option(54, HOST4 + b"x") + b"\xff"))),
    "size-of-one": (server.MALFORMED, wrapped(bootp(KIND + option(57, b"x") + b"\xff"))),
    "release-with-address": (server.RELEASED, wrapped(bootp(option(53, bytes((RELEASE,))) + b"\xff", ciaddr=GUEST4))),
    "option-past-the-end": (server.MALFORMED, wrapped(bootp(KIND + b"\x0c\xff", size=0) + bytes(50))),
    "option-without-length": (server.MALFORMED, wrapped(bootp(KIND + bytes(60) + b"\x0c", size=0))),
    "empty-type": (server.MALFORMED, wrapped(bootp(option(53, b"") + b"\xff"))),
    "type-of-two": (server.MALFORMED, wrapped(bootp(option(53, b"\1\1") + b"\xff"))),
    "type-twice": (server.MALFORMED, wrapped(bootp(KIND + KIND + b"\xff"))),
    "address-of-three": (server.MALFORMED, wrapped(bootp(KIND + option(50, b"abc") + b"\xff"))),
    "address-of-255": (server.MALFORMED, wrapped(bootp(KIND + option(50, b"a" * 255) + b"\xff"))),
}


@pytest.mark.parametrize(("reason", "frame"), PASSED.values(), ids=PASSED)
def test_frame_without_an_answer_42(reason: str | None, frame: bytes) -> None:
    """Hostile input 42: the frame goes to the network.  A DHCP frame has a reason for that."""
    assert outcome(frame) == reason


def test_unchanged_and_allowed_frames_are_answered() -> None:
    """The unchanged frame of the cases above is answered, and so are frames with allowed changes."""
    for changes in (
        {}, {"udp_kind": "none"}, {"destination": HOST4}, {"eth_destination": HOST_LLADDR},
        {"first": 0x46, "options": b"\1" * 4},
    ):  # fmt: skip
        assert ask(wrapped(GOOD, **changes)) is not None
    assert ask(wrapped(GOOD) + bytes(20)) is not None  # padding of the Ethernet frame


def test_missing_sum_is_accepted_if_the_device_computes_it() -> None:
    """A guest with CSUM sends the sum of the pseudo header only."""
    assert ask(wrapped(GOOD, udp_kind="pseudo"), sum_missing=True) is not None


def test_host_without_link_layer_address_answers_broadcasts_only() -> None:
    """The address is unknown until the process is told."""
    nic = NIC.replace(host_lladdr=b"")

    assert ask(dhcp(DISCOVER), nic) is not None
    assert ask(wrapped(GOOD, eth_destination=HOST_LLADDR), nic) is None


# --- random input ------------------------------------------------------------------------------------------------

SAMPLES = [
    dhcp(DISCOVER, more=option(61, b"\x01" + LLADDR)),
    dhcp(REQUEST, requested=GUEST4),
    dhcp(REQUEST, ciaddr=GUEST4),
    request(bootp(b"", cookie=b"")),
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_prefix_is_answered(sample: bytes) -> None:
    """A truncated frame is not answered, because its lengths or sums are wrong."""
    for length in range(len(sample)):
        assert ask(sample[:length]) is None


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_frame_with_a_flipped_bit_is_answered(sample: bytes) -> None:
    """The sums show every changed bit."""
    for bit in range(len(sample) * 8):
        flipped = bytearray(sample)
        flipped[bit // 8] ^= 1 << bit % 8
        assert ask(bytes(flipped)) is None


def test_random_bodies() -> None:
    """Random bodies with correct sums get every kind of answer, or none (fixed seed)."""
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
    """Frames of random bytes are not answered (fixed seed)."""
    choice = random.Random(43)
    for _ in range(5000):
        assert ask(choice.randbytes(choice.randrange(1600))) is None


def test_sums() -> None:
    """The sums are correct for odd and even lengths, and for data that adds up to zero."""
    choice = random.Random(44)
    for _ in range(2000):
        data = choice.randbytes(2 * choice.randrange(1, 100))
        total = checksum(data)
        assert 0 <= total <= 0xFFFF
        assert sum_is_right(data + total.to_bytes(2, "big"))
        assert not sum_is_right(data + (total ^ 1 << choice.randrange(16)).to_bytes(2, "big"))
    assert checksum(b"\xff\xff") == 0
    assert checksum(b"\x01") == checksum(b"\x01\x00")
