"""A parent that was taken over reaches no interface that a configuration could not name."""

import errno
from collections.abc import Mapping

import pytest

from vmd.config.model import MAX_FORWARDS, MAX_NICS, MAX_RDOMAIN, Forward
from vmd.errors import OperatorError
from vmd.ipc.messages.priv import MakeNics, NicWanted, SwitchRequest
from vmd.priv.requests import check_forwards, check_request, check_switch, guest_of, inside, is_tap_name, networks_of

HOST4, GUEST4 = bytes((100, 64, 3, 2)), bytes((100, 64, 3, 3))
PREFIX6 = bytes.fromhex("fd000000000000010000000000000000")
NIC = NicWanted(name="tap3", alias="vm3-if0-web", lladdr=bytes.fromhex("fee1bad10203"))
LOCAL = NIC.replace(host4=HOST4, prefix6=PREFIX6)
FORWARD = Forward(port=8022, to=22)


def request(*nics: NicWanted, vmid: int = 3) -> MakeNics:
    """Return a request for these interfaces."""
    return MakeNics(vmid=vmid, ticket=1, nics=nics)


def refused(*nics: NicWanted, vmid: int = 3) -> str:
    """Return the sentence with which a request is refused."""
    with pytest.raises(OperatorError) as error:
        check_request(request(*nics, vmid=vmid))
    assert error.value.number == errno.EPERM
    return str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"name": ""}, {"groups": ("web",)}, {"groups": ("web", "dmz")}, {"rdomain": 0}, {"rdomain": MAX_RDOMAIN},
        {"alias": "vm3-if0-" + "x" * 247}, {"alias": "vm12-if3-a b~"}, {"host4": HOST4}, {"prefix6": PREFIX6},
        {"host4": HOST4, "guest4": GUEST4}, {"host4": HOST4, "guest4": bytes((100, 64, 255, 1)), "length4": 16},
        {"host4": HOST4, "length4": 16}, {"host4": HOST4, "forwards": (FORWARD,)},
        {"host4": HOST4, "guest4": GUEST4, "forwards": (FORWARD,)},
    ],
)  # fmt: skip
def test_what_a_configuration_can_say(changed: Mapping[str, object]) -> None:
    """It is accepted."""
    check_request(request(NIC.replace(**changed)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "eth0"}, "not called tap<n>"),
        ({"name": "tap"}, "not called tap<n>"),
        ({"name": "tap1x"}, "not called tap<n>"),
        ({"name": "tap" + "1" * 13}, "not called tap<n>"),
        ({"alias": ""}, "an alias that is not a VM's"),
        ({"alias": "switch1-lan"}, "an alias that is not a VM's"),
        ({"alias": "vm3-ifx-web"}, "an alias that is not a VM's"),
        ({"alias": "vm-if0-web"}, "an alias that is not a VM's"),
        ({"alias": " vm3-if0-web"}, "an alias that is not a VM's"),
        ({"alias": "vm3-if0-\n"}, "an alias that is not a VM's"),
        ({"alias": "vm3-if0-\x7f"}, "an alias that is not a VM's"),
        ({"alias": "vm3-if0-ü"}, "an alias that is not a VM's"),
        ({"alias": "vm3-if0-" + "x" * 248}, "an alias that is not a VM's"),
        ({"groups": ("a", "b", "c")}, "not a name of a group"),
        ({"groups": ("",)}, "not a name of a group"),
        ({"groups": ("web", "a b")}, "not a name of a group"),
        ({"groups": ("web1",)}, "not a name of a group"),
        ({"rdomain": -1}, "rdomain -1"),
        ({"rdomain": MAX_RDOMAIN + 1}, "rdomain 256"),
        ({"host4": HOST4[:3]}, "not an address"),
        ({"host4": PREFIX6}, "not an address"),
        ({"prefix6": HOST4}, "not an address"),
        ({"prefix6": PREFIX6[:8] + b"\1" + bytes(7)}, "not an address"),
        ({"prefix6": PREFIX6[:15] + b"\1"}, "not an address"),
        ({"lladdr": b""}, "not an address"),
        ({"lladdr": bytes(5)}, "not an address"),
        ({"lladdr": bytes(7)}, "not an address"),
        ({"host4": HOST4, "length4": 15}, "not an address"),
        ({"host4": HOST4, "length4": 32}, "not an address"),
        ({"guest4": GUEST4}, "not an address of a guest"),
        ({"host4": HOST4, "guest4": bytes((100, 64, 3, 4))}, "not an address of a guest"),
        ({"host4": HOST4, "guest4": GUEST4 + b"\0"}, "not an address of a guest"),
        ({"forwards": (FORWARD,)}, "an interface that has no address"),
        ({"host4": HOST4, "forwards": (FORWARD, FORWARD)}, "has the same port of the host"),
        ({"host4": HOST4, "forwards": (FORWARD.replace(to=0),)}, "forward"),
    ],
)
def test_what_no_configuration_can_say(changed: Mapping[str, object], words: str) -> None:
    """It is refused, wherever it is in the request."""
    assert words in refused(NIC.replace(**changed))
    assert words in refused(NIC, NIC.replace(**changed))


@pytest.mark.parametrize("vmid", [0, -1])
def test_a_vm_has_a_number(vmid: int) -> None:
    """0 is no VM."""
    assert refused(NIC, vmid=vmid) == f"refused: 1 interfaces for vm {vmid}"


def test_a_vm_has_so_many_interfaces() -> None:
    """One at least: a VM without is not requested."""
    check_request(request(*[NIC] * MAX_NICS))
    assert refused(*[NIC] * (MAX_NICS + 1)) == f"refused: {MAX_NICS + 1} interfaces for vm 3"
    assert refused() == "refused: 0 interfaces for vm 3"


def test_forwards_lead_to_an_address() -> None:
    """Each interface has so many."""
    many = [Forward(port=8000 + number, to=22) for number in range(MAX_FORWARDS + 1)]
    check_forwards(GUEST4, many[:-1])
    check_forwards(b"", ())

    with pytest.raises(OperatorError, match="too many forwards"):
        check_forwards(GUEST4, many)


@pytest.mark.parametrize(
    "switch",
    [
        SwitchRequest(interface="br0", alias="switch1-lan"),
        SwitchRequest(interface="lan", alias="switch12-", rdomain=0),
        SwitchRequest(interface="bridge0", alias="switch1-lan", rdomain=MAX_RDOMAIN),
    ],
)  # fmt: skip
def test_a_switch_of_a_configuration(switch: SwitchRequest) -> None:
    """It is accepted."""
    check_switch(switch)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"interface": ""}, "not a name of a bridge"),
        ({"interface": "tap0"}, "not a name of a bridge"),
        ({"interface": "../all"}, "not a name of a bridge"),
        ({"interface": "x" * 16}, "not a name of a bridge"),
        ({"alias": "vm1-if0-web"}, "an alias that is not a switch's"),
        ({"alias": "switch-lan"}, "an alias that is not a switch's"),
        ({"alias": "switch1-\n"}, "an alias that is not a switch's"),
        ({"alias": "switch1-" + "x" * 248}, "an alias that is not a switch's"),
        ({"rdomain": -1}, "in rdomain -1"),
        ({"rdomain": MAX_RDOMAIN + 1}, "in rdomain 256"),
    ],
)
def test_a_switch_that_no_configuration_has(changed: Mapping[str, object], words: str) -> None:
    """Its name becomes part of the names of settings of the kernel, too."""
    switch = SwitchRequest(interface="br0", alias="switch1-lan").replace(**changed)

    with pytest.raises(OperatorError, match=words) as error:
        check_switch(switch)

    assert error.value.number == errno.EPERM


def test_only_taps_are_adopted() -> None:
    """`tap` alone is the request for any number."""
    assert [name for name in ("tap0", "tap123", "tap", "", "br0", "tapx", "eth0") if is_tap_name(name)] == [
        "tap0", "tap123",
    ]  # fmt: skip


# --- addresses ----------------------------------------------------------------------------------------------------


def test_the_guest_has_the_other_address_of_a_pair() -> None:
    """If the parent does not say it."""
    assert guest_of(NIC) == b""
    assert guest_of(LOCAL) == GUEST4
    assert guest_of(LOCAL.replace(host4=GUEST4)) == HOST4
    assert guest_of(LOCAL.replace(guest4=bytes((9, 9, 9, 9)))) == bytes((9, 9, 9, 9))


def test_an_interface_has_a_network_of_each_family() -> None:
    """The IPv6 network is a /64."""
    assert networks_of(NIC) == ()
    assert networks_of(LOCAL.replace(length4=24)) == ((HOST4, 24), (PREFIX6, 64))
    assert networks_of(LOCAL.replace(host4=b"")) == ((PREFIX6, 64),)


@pytest.mark.parametrize(
    ("address", "length", "is_inside"),
    [
        ((10, 0, 0, 255), 24, True), ((10, 0, 1, 0), 24, False), ((10, 0, 1, 255), 23, True),
        ((10, 0, 2, 0), 23, False), ((10, 0, 0, 0), 32, True), ((10, 0, 0, 1), 32, False),
        ((255, 255, 255, 255), 0, True), ((138, 0, 0, 0), 1, False),
    ],
)  # fmt: skip
def test_an_address_in_a_network(address: tuple[int, ...], length: int, is_inside: bool) -> None:
    """Only the first bits count.  An address of another family is in none."""
    assert inside(bytes(address), bytes((10, 0, 0, 0)), length) is is_inside
    assert not inside(bytes(16), bytes((10, 0, 0, 0)), 0)
