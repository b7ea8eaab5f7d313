"""The addresses of interfaces: how they are computed, the limits of the ranges, and link-layer addresses."""

import ipaddress

import pytest

from vmd.config.model import MAX_NICS, NicConfig, Owner, Prefix, VmConfig
from vmd.errors import OperatorError
from vmd.parent.addresses import Plan, random_lladdr, random_ula, room
from vmd.parent.vmtable import VmTable

DEFAULT = Prefix(address=bytes((100, 64, 0, 0)), length=10)


def prefix(text: str) -> Prefix:
    """Parse an address range."""
    network = ipaddress.ip_network(text)
    return Prefix(address=network.network_address.packed, length=network.prefixlen)


def v4(address: bytes) -> str:
    """Format an address."""
    return str(ipaddress.ip_address(address))


def test_the_example_of_the_catalogue() -> None:
    """Cat. 7.2: number 3, interface 1, default prefix."""
    plan = Plan(number=3, prefix4=DEFAULT)

    assert (v4(plan.host4(1)), v4(plan.guest4(1))) == ("100.64.3.4", "100.64.3.5")
    assert plan.network6(1) == b""


@pytest.mark.parametrize(
    ("text", "last", "host"),
    [
        ("100.64.0.0/10", 16383, "100.127.255.2"),
        ("192.168.0.0/16", 255, "192.168.255.2"),
        ("10.0.0.0/8", 65535, "10.255.255.2"),
    ],
)
def test_the_last_vm_that_fits_into_a_prefix(text: str, last: int, host: str) -> None:
    """The next VM is refused.  The message names its number and interface."""
    assert room(prefix(text), None) == last + 1
    assert v4(Plan(number=last, prefix4=prefix(text)).host4(0)) == host
    with pytest.raises(OperatorError, match=f"dhcp address range exceeded, vm number {last + 1} interface 2"):
        Plan(number=last + 1, prefix4=prefix(text)).host4(2)


def test_the_last_interface() -> None:
    """A VM has room for 127 interfaces.  Its last address is below the first address of the next VM."""
    plan = Plan(number=1, prefix4=DEFAULT)

    assert v4(plan.guest4(126)) == "100.64.1.255"
    with pytest.raises(OperatorError, match="interface 127"):
        plan.host4(127)
    six = plan.replace(prefix6=prefix("fd42:1:2::/48"))
    assert v4(six.network6(MAX_NICS - 1)) == f"fd42:1:2:{2 * MAX_NICS - 1:x}::"
    with pytest.raises(OperatorError, match=f"interface {MAX_NICS}"):
        six.network6(MAX_NICS)


@pytest.mark.parametrize("number", [0, -1])
def test_there_is_no_vm_0(number: int) -> None:
    """Numbers below 1 are also refused in a plan that came from elsewhere."""
    with pytest.raises(OperatorError):
        Plan(number=number, prefix4=DEFAULT).host4(0)
    with pytest.raises(OperatorError):
        Plan(number=number, prefix4=DEFAULT, prefix6=prefix("fd00::/48")).network6(0)


def test_no_two_interfaces_share_addresses() -> None:
    """Every interface of every VM has a /31 and a /64 of its own, inside the prefixes."""
    wide6 = prefix("fd42:1:2::/48")
    plans = [Plan(number=number, prefix4=DEFAULT, prefix6=wide6) for number in (*range(1, 300), 16383)]
    hosts = [plan.host4(index) for plan in plans for index in range(MAX_NICS)]
    networks = [plan.network6(index) for plan in plans for index in range(MAX_NICS)]

    assert len({int.from_bytes(host, "big") >> 1 for host in hosts}) == len(hosts)
    assert not any(host[-1] % 2 for host in hosts)
    assert len(set(networks)) == len(networks)
    assert all(ipaddress.ip_address(network) in ipaddress.ip_network("fd42:1:2::/48") for network in networks)
    assert not any(any(network[8:]) for network in networks)


def test_a_60_has_room_for_three_vms() -> None:
    """Vm.conf allows no smaller prefix."""
    small = prefix("fd42:1:2:70::/60")

    assert room(DEFAULT, small) == 4
    assert v4(Plan(number=3, prefix4=DEFAULT, prefix6=small).network6(3)) == "fd42:1:2:7f::"
    with pytest.raises(OperatorError, match="inet6 prefix exhausted, vm number 4 interface 0"):
        Plan(number=4, prefix4=DEFAULT, prefix6=small).network6(0)


def test_a_random_range() -> None:
    """A random range is unique local (RFC 4193): fd, 40 random bits, then zeros."""
    one, other = random_ula(), random_ula()

    assert (one.length, one.address[0], one.address[6:]) == (48, 0xFD, bytes(10))
    assert one != other


def test_link_layer_addresses() -> None:
    """Cat. 2.5: fe:e1:bb:d<n>:xx:xx.  No address is given twice, and there is an error when all are taken."""
    assert random_lladdr(0, ()).hex(":")[:11] == "fe:e1:bb:d1"
    assert random_lladdr(3, ()).hex(":")[:11] == "fe:e1:bb:d4"
    all_but_one = {bytes.fromhex("fee1bbd1") + number.to_bytes(2, "big") for number in range(65535)}
    assert random_lladdr(0, all_but_one) == bytes.fromhex("fee1bbd1ffff")
    with pytest.raises(OperatorError, match="no link-layer address is left"):
        random_lladdr(0, all_but_one | {bytes.fromhex("fee1bbd1ffff")})


def test_link_layer_addresses_stay_with_the_name_for_the_life_of_the_daemon() -> None:
    """A VM that is removed and added again has the same ones.  Configured addresses are not changed."""
    table = VmTable()
    config = VmConfig(name="a", nics=(NicConfig(), NicConfig(lladdr=b"\2\0\0\0\0\1"), NicConfig()))
    first = table.add(config, from_config=True)
    table.remove(first)
    again = table.add(config, from_config=True)
    other = table.add(config.replace(name="b"), from_config=True)
    somebody = VmTable().add(config.replace(owner=Owner(uid=7)), from_config=True)

    assert again.config == first.config
    assert again.config.nics[1].lladdr == b"\2\0\0\0\0\1"
    assert len({nic.lladdr for vm in (again, other) for nic in vm.config.nics}) == 5
    assert all(len(nic.lladdr) == 6 for nic in somebody.config.nics)
    assert table.with_all_lladdrs(config) == first.config


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ("10.0.0.2/31", "10.0.0.3"), ("10.0.0.3/31", "10.0.0.2"), ("10.0.0.77/24", "10.0.0.1"),
        ("10.0.0.1/24", "10.0.0.2"), ("10.0.0.5/30", "10.0.0.6"), ("10.0.0.6/30", "10.0.0.5"),
        ("10.1.255.254/16", "10.1.0.1"),
    ],
)  # fmt: skip
def test_an_address_that_the_operator_has_chosen(guest: str, host: str) -> None:
    """Only one interface has a chosen address.  The addresses of the others still follow from the VM's number."""
    interface = ipaddress.ip_interface(guest)
    chosen = Prefix(address=interface.packed, length=interface.network.prefixlen)
    plan = Plan(number=3, prefix4=DEFAULT, fixed=(None, chosen))

    assert (v4(plan.guest4(1)), v4(plan.host4(1)), plan.length4(1)) == (guest.partition("/")[0], host, chosen.length)
    for index in (0, 2):
        plain = Plan(number=3, prefix4=DEFAULT)
        assert (plan.guest4(index), plan.host4(index)) == (plain.guest4(index), plain.host4(index))
        assert plan.length4(index) == 31
