"""The messages that only the process of a network interface gets, and the interface that START describes."""

from typing import Any

import pytest

from tests.support.packets import GUEST4, HOST4, HOST_LLADDR, LLADDR
from vmd.devices.process import Host
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.main import NetProcess, interface_of, make
from vmd.errors import PeerError
from vmd.ipc import devmsg

DNS4, DNS6 = bytes((9, 9, 9, 9)), bytes(15) + b"\1"
LINK_LOCAL, PREFIX = b"\xfe\x80" + bytes(13) + b"\1", b"\xfd" + bytes(15)


class Net:
    """The device behind the process; it keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.addresses = self
        self.known = (b"one", b"two")
        self.interface = Interface(lladdr=LLADDR, dns4=(DNS4,), dns6=(DNS6, LINK_LOCAL))

    def limit(self, rate: int) -> None:
        """Keep it."""
        self.calls.append(("limit", rate))

    def announce(self, entries: tuple[bytes, ...]) -> None:
        """Keep them."""
        self.calls.append(("announce", entries))

    def set_resolvers(self, dns4: tuple[bytes, ...], dns6: tuple[bytes, ...]) -> None:
        """Keep them."""
        self.calls.append(("resolvers", dns4, dns6))


class Bare(NetProcess):
    """The process without memory and loop."""

    def __init__(self) -> None:
        self.net = Net()
        self.device = self.net  # type: ignore[assignment]


@pytest.fixture
def process() -> Bare:
    """The process."""
    return Bare()


def test_limit_and_name_servers(process: Bare) -> None:
    """Places without a server are left out.  The same servers are those of the interface."""
    process.take_inform(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 5, 7 << 20))
    process.take_inform(devmsg.RESOLVERS_BODY.pack(devmsg.RESOLVERS, bytes(4) + DNS4, DNS6))
    process.take_inform(devmsg.TYPE.pack(devmsg.SAME_RESOLVERS))
    assert process.net.calls == [
        ("limit", 7 << 20), ("resolvers", (DNS4,), (DNS6,)), ("resolvers", (DNS4,), (DNS6, LINK_LOCAL)),
    ]  # fmt: skip


KINDS = (devmsg.ANNOUNCED_4, devmsg.ANNOUNCED_6, devmsg.ANNOUNCED_ROUTER)
ENTRIES = [devmsg.ANNOUNCED.pack(kind, bytes((number,)) * 16) for number, kind in enumerate(KINDS, 1)]


@pytest.mark.parametrize("entries", [[], ENTRIES, ENTRIES[:1] * devmsg.ANNOUNCED_MAX], ids=len)
def test_addresses_are_announced(process: Bare, entries: list[bytes]) -> None:
    """All of them; without any, switches learn the link-layer address only."""
    process.take_inform(devmsg.TYPE.pack(devmsg.ANNOUNCE) + b"".join(entries))
    assert process.net.calls == [("announce", tuple(entries))]


@pytest.mark.parametrize(
    "raw",
    [
        ENTRIES[0][:-1], ENTRIES[0] + b"\4", ENTRIES[0] * (devmsg.ANNOUNCED_MAX + 1), b"\5" + bytes(16),
        ENTRIES[0] + b"\0" + bytes(16),
    ],
    ids=["short", "rest", "many", "kind", "second-kind"],
)  # fmt: skip
def test_addresses_that_cannot_be_announced(process: Bare, raw: bytes) -> None:
    """They have come from another host."""
    with pytest.raises(PeerError, match="addresses that cannot be announced"):
        process.take_inform(devmsg.TYPE.pack(devmsg.ANNOUNCE) + raw)
    assert process.net.calls == []


def test_known_addresses_are_told(process: Bare) -> None:
    """One after the other; the question has nothing behind it."""
    question = devmsg.TYPE.pack(devmsg.ADDRESSES)
    assert process.QUESTIONS[devmsg.ADDRESSES](process, question) == question + b"onetwo"
    with pytest.raises(PeerError):
        process.QUESTIONS[devmsg.ADDRESSES](process, question + b"\0")
    for kind in (devmsg.SAME_RESOLVERS, devmsg.LIMIT, devmsg.RESOLVERS):
        with pytest.raises(PeerError):
            process.take_inform(devmsg.TYPE.pack(kind) + b"\0")


class Described(Host):
    """A host as START describes it."""

    def __init__(self, net: tuple[Any, ...] | None, queues: int = 2, resources: int = 1) -> None:
        self.net = net
        self.host_name = "web"
        self.kicks = [0] * queues
        self.resources = [0] * resources


def fields(
    *, lladdr: bytes = LLADDR, flags: int = 0, mtu: int = 0, guest4: bytes = GUEST4, length4: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the fields of devmsg.NET; arguments replace the usual ones."""
    packed = devmsg.NET.pack(
        lladdr, HOST_LLADDR, flags, mtu, guest4, HOST4, LINK_LOCAL, PREFIX, bytes(4) + DNS4, DNS6, length4
    )
    return devmsg.NET.unpack(packed)


FLAGS = {
    "locked": devmsg.NET_LOCKED, "local": devmsg.NET_LOCAL, "pxe": devmsg.NET_PXE, "asks": devmsg.NET_ASKS,
    "vhost": devmsg.NET_VHOST,
}  # fmt: skip


@pytest.mark.parametrize("name", ["", *FLAGS])
def test_interface_of_start(name: str) -> None:
    """Each flag has one meaning.  Addresses that are all zero are not given."""
    found = interface_of(Described(fields(flags=FLAGS.get(name, 0), mtu=1400, length4=24)))
    assert found == Interface(
        lladdr=LLADDR, host_lladdr=HOST_LLADDR, mtu=1400, guest4=GUEST4, host4=HOST4, host_link_local=LINK_LOCAL,
        prefix6=PREFIX, dns4=(DNS4,), dns6=(DNS6,), host_name="web", length4=24, **({name: True} if name else {}),
    )  # fmt: skip
    assert interface_of(Described(fields(guest4=bytes(4)))).guest4 == b""


@pytest.mark.parametrize(("length4", "mask"), [(0, "fffffffe"), (1, "80000000"), (24, "ffffff00"), (31, "fffffffe")])
def test_network_of_guest_and_host(length4: int, mask: str) -> None:
    """The smallest one, unless another length is given."""
    assert interface_of(Described(fields(length4=length4))).netmask.hex() == mask


def test_router_of_an_interface() -> None:
    """Its link-local address as given, else that of the host's link-layer address (RFC 4291)."""
    interface = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, host_link_local=LINK_LOCAL)
    assert interface.router == LINK_LOCAL
    assert interface.replace(host_link_local=b"").router.hex() == "fe80000000000000081b2cfffe3d4e5f"
    assert Interface(lladdr=LLADDR).router == b""


IMPOSSIBLE = {
    "no address": (fields(lladdr=bytes(6)), "cannot be the address of an interface"),
    "group": (fields(lladdr=b"\1" + LLADDR[1:]), "cannot be the address of an interface"),
    "mtu 67": (fields(mtu=67), "mtu 67 is not between 68 and 16384"),
    "mtu 16385": (fields(mtu=16385), "mtu 16385 is not between 68 and 16384"),
    "prefix": (fields(length4=32), "a network with a prefix of 32 bits"),
    "local": (fields(flags=devmsg.NET_LOCAL, guest4=bytes(4)), "a local interface without addresses"),
    "none": (None, "a network interface without its addresses and two queues"),
}


@pytest.mark.parametrize(("net", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_interface(net: tuple[Any, ...] | None, words: str) -> None:
    """The process ends with a sentence."""
    with pytest.raises(PeerError, match=words):
        interface_of(Described(net))


@pytest.mark.parametrize("mtu", [68, 16384])
def test_bounds_of_the_mtu(mtu: int) -> None:
    """They are possible."""
    assert interface_of(Described(fields(mtu=mtu))).mtu == mtu


@pytest.mark.parametrize("queues", [0, 1, 3])
def test_interface_has_two_queues(queues: int) -> None:
    """One in each direction."""
    with pytest.raises(PeerError, match="two queues"):
        interface_of(Described(fields(), queues))


@pytest.mark.parametrize("resources", [0, 2])
def test_interface_has_one_tap(process: Bare, resources: int) -> None:
    """Nothing else is taken."""
    process.host = Described(fields(), resources=resources)
    with pytest.raises(PeerError, match=f"{resources} resources instead of one tap"):
        make(process)
