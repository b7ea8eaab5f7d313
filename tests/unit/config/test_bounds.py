"""The first and the last value that each rule accepts: one less and one more are refused."""

from collections.abc import Callable

import pytest

from vmd.config import rules, values
from vmd.config.model import DiskConfig, Forward, NicConfig, Prefix, VmConfig

GIB = 1 << 30
Rule = Callable[[int], object]


@pytest.mark.parametrize(
    ("rule", "least", "most"),
    [
        (rules.memory_bytes, 1 << 20, 1024 * GIB),
        (rules.vcpus, 1, 16),
        (rules.disk_count, None, 4),
        (rules.nic_count, 0, 4),
        (rules.rdomain, 0, 252),
        (rules.user_number, 0, 0xFFFFFFFE),
        (rules.iops, 1, 10_000_000),
        (rules.cpu_percent, 1, 100_000),
        (rules.weight, 1, 10_000),
        (rules.rate, 64 << 10, 1 << 40),
        (rules.console_log_bytes, 64 << 10, 1 << 40),
        (rules.console_logs_kept, 0, 99),
        (lambda count: rules.forward(Forward(port=1000, to=1000, count=count)), 1, 1024),
        (lambda port: rules.forward(Forward(port=port, to=22)), 1, 65535),
        (lambda port: rules.forward(Forward(port=22, to=port)), 1, 65535),
        (lambda port: rules.forward(Forward(port=port, to=1, count=10)), 1, 65526),
        (lambda port: rules.forward(Forward(port=1, to=port, count=10)), 1, 65526),
        (lambda number: rules.disks((DiskConfig(path="/x"),) * number), None, 4),
        (lambda number: rules.nics((NicConfig(),) * number), None, 4),
        (lambda number: rules.forwards([Forward(port=1 + each, to=1) for each in range(number)]), None, 16),
        (lambda number: rules.plan(VmConfig(name="a", plan_id=number)), 0, (1 << 31) - 1),
        (values.memory_limit, 1 << 20, None),
    ],
)  # fmt: skip
def test_numbers(rule: Rule, least: int | None, most: int | None) -> None:
    """Both ends belong to the range."""
    for end, outside in ((least, -1), (most, 1)):
        if end is not None:
            rule(end)
            refuses(rule, end + outside)


def refuses(rule: Callable[..., object], value: object) -> None:
    """Require that a rule refuses a value with a sentence."""
    with pytest.raises(ValueError, match=r"\w"):
        rule(value)


@pytest.mark.parametrize("number", [253, 254, 255, 256])
def test_the_host_s_routing_tables(number: int) -> None:
    """They are behind the last number of a routing domain of VMs."""
    refuses(rules.rdomain, number)


@pytest.mark.parametrize(
    ("rule", "longest"),
    [
        (rules.vm_name, "n" * 63),
        (rules.switch_name, "s" * 63),
        (rules.bridge_name, "b" * 15),
        (rules.tap_name, "tap" + "1" * 12),
        (rules.group_name, "g" * 15),
        (rules.cmdline, "c" * 2047),
        (rules.disk_serial, "s" * 20),
        (rules.host_name, "h" * 63),
        (rules.host_name, ("h" * 63 + ".") * 3 + "h" * 63),
        (rules.console_log_path, "/" + "l" * 189),
        (rules.console_log_path, "/" + "l/" * 510 + "ll"),
        (lambda name: rules.path("disk path", name), "/" + "d" * 1022),
        (values.parent_name, "n" * 63),
        (lambda text: rules.disk_file(f"disk0:{text}"), "/" + "x" * 1022),
    ],
)  # fmt: skip
def test_texts(rule: Callable[[str], object], longest: str) -> None:
    """One character more is refused."""
    rule(longest)
    refuses(rule, longest + longest[-1])


@pytest.mark.parametrize("rule", [rules.vm_name, rules.switch_name, lambda name: rules.path("disk path", name)])
def test_lengths_are_in_bytes(rule: Callable[[str], object]) -> None:
    """As the kernel and upstream count them."""
    with pytest.raises(ValueError, match=r"too long|invalid"):
        rule("/" + "ü" * 512)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True), ("A.b-c_9", True), ("9", True), ("a.", True), (".a", False), ("-a", False), ("_a", False),
        ("a/b", False), ("a b", False), ("ä", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_vms(name: str, valid: bool) -> None:
    """They are names of files, too."""
    if valid:
        assert rules.vm_name(name) == name
    else:
        refuses(rules.vm_name, name)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("b", True), ("!~", True), ("b\x7f", False),
        ("br0", True), ("my-lan.5", True), ("vlan", True), ("tape", True), ("", False), ("tap", False), ("tap3", False),
        ("lo", False), ("all", False), ("default", False), (".", False), ("..", False), ("a/b", False), ("br%d", False),
        ("a:b", False), ("a b", False), ("bü", False),
    ],
)  # fmt: skip
def test_names_of_bridges(name: str, valid: bool) -> None:
    """Linux has settings with some of these names for all interfaces."""
    if valid:
        assert rules.bridge_name(name) == name
    else:
        refuses(rules.bridge_name, name)


@pytest.mark.parametrize(
    ("name", "valid"),
    [("lab", True), ("a9b", True), ("a_.-b", True), ("", True), ("lab1", False), ("1", False), ("a b", False)],
)
def test_names_of_groups(name: str, valid: bool) -> None:
    """The name of an interface ends in a digit."""
    if valid:
        assert rules.group_name(name) == name
    else:
        refuses(rules.group_name, name)


@pytest.mark.parametrize(
    ("serial", "valid"),
    [(" ", True), ("~", True), ("!", True), ("", False), ("\x1f", False), ("\x7f", False), ("ü", False)],
)
def test_serial_numbers(serial: str, valid: bool) -> None:
    """They have printable ASCII characters."""
    if valid:
        assert rules.disk_serial(serial) == serial
    else:
        refuses(rules.disk_serial, serial)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True), ("a.b", True), ("9-9.x", True), ("a-", False), ("-a", False), ("a.-b", False), ("a-.b", False),
        ("", False), (".", False), ("a.", False), (".a", False), ("a..b", False), ("a_b", False), ("ü", False),
    ],
)  # fmt: skip
def test_host_names(name: str, valid: bool) -> None:
    """Each part has letters, digits and inner hyphens."""
    if valid:
        assert rules.host_name(name) == name
    else:
        refuses(rules.host_name, name)


@pytest.mark.parametrize("name", ["", "l", "l/m", "/", "/l/", "/.", "/l/.."])
def test_paths_of_console_logs(name: str) -> None:
    """They are absolute, and name a file."""
    refuses(rules.console_log_path, name)


def test_quoted_values_are_cut() -> None:
    """An error message has at most 80 characters of a value."""
    assert rules.shown("x" * 80) == "x" * 80
    assert rules.shown("x" * 81) == "x" * 77 + "..."


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "valid"),
    [
        ("fe1bbad10203", True), ("000000000001", True), ("fefffffffffe", True), ("000000000000", False),
        ("010000000000", False), ("ffffffffffff", False), ("fe1bbad102", False), ("fe1bbad1020304", False), ("", False),
    ],
)  # fmt: skip
def test_ethernet_addresses(address: str, valid: bool) -> None:
    """An interface has neither none nor one of a group."""
    raw = bytes.fromhex(address)
    if valid:
        assert rules.lladdr(raw) == raw
    else:
        refuses(rules.lladdr, raw)


@pytest.mark.parametrize(
    ("address", "length", "valid"),
    [
        ((10, 0, 0, 1), 31, True), ((10, 0, 0, 0), 31, True), ((10, 0, 0, 1), 30, True), ((10, 0, 0, 2), 30, True),
        ((10, 0, 0, 0), 30, False), ((10, 0, 0, 3), 30, False), ((10, 0, 0, 1), 16, True), ((10, 0, 0, 0), 16, False),
        ((10, 0, 255, 255), 16, False), ((10, 0, 255, 254), 16, True), ((10, 0, 0, 1), 15, False),
        ((10, 0, 0, 1), 32, False), ((1, 0, 0, 1), 24, True), ((0, 0, 0, 1), 24, False), ((126, 0, 0, 1), 24, True),
        ((127, 0, 0, 1), 24, False), ((128, 0, 0, 1), 24, True), ((223, 0, 0, 1), 24, True),
        ((224, 0, 0, 1), 24, False), ((255, 0, 0, 1), 24, False), ((169, 254, 0, 1), 24, False),
        ((169, 253, 0, 1), 24, True), ((10, 0, 1), 24, False),
    ],
)  # fmt: skip
def test_fixed_addresses(address: tuple[int, ...], length: int, valid: bool) -> None:
    """The first and the last address of a network are no guest's, except in a pair."""
    prefix = Prefix(address=bytes(address), length=length)
    if valid:
        assert rules.fixed_address(prefix) == prefix
    else:
        refuses(rules.fixed_address, prefix)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (((10, 0, 0, 1), 31), ((10, 0, 0, 0), 31), True),
        (((10, 0, 0, 1), 31), ((10, 0, 0, 2), 31), False),
        (((10, 0, 0, 1), 24), ((10, 0, 0, 200), 31), True),
        (((10, 0, 0, 200), 31), ((10, 0, 0, 1), 24), True),
        (((10, 0, 1, 0), 24), ((10, 0, 0, 0), 24), False),
        (((10, 0, 1, 0), 23), ((10, 0, 0, 0), 24), True),
        (((10, 0, 0, 1), 24), ((10,) * 16, 24), False),
    ],
)
def test_networks_in_common(
    one: tuple[tuple[int, ...], int], other: tuple[tuple[int, ...], int], same: bool
) -> None:
    """The larger one decides."""
    first, second = (Prefix(address=bytes(address), length=length) for address, length in (one, other))

    assert rules.same_network(first, second) is same


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (Forward(port=80, to=80), Forward(port=81, to=80), True),
        (Forward(port=80, to=80), Forward(port=80, to=81), False),
        (Forward(port=80, to=80), Forward(port=80, to=80, udp=True), True),
        (Forward(port=80, to=80, count=3), Forward(port=82, to=80), False),
        (Forward(port=80, to=80, count=3), Forward(port=83, to=80), True),
        (Forward(port=83, to=80), Forward(port=80, to=80, count=3), True),
        (Forward(port=82, to=80), Forward(port=80, to=80, count=3), False),
    ],
)
def test_a_port_of_the_host_is_forwarded_once(first: Forward, second: Forward, fits: bool) -> None:
    """By one interface, and by all interfaces of a VM."""
    if fits:
        rules.forwards((first, second))
    else:
        refuses(rules.forwards, (first, second))
    nics = [NicConfig(local=True, forwards=(each,)) for each in (first, second)]
    if fits:
        assert rules.without_conflicts(nics) == tuple(nics)
    else:
        refuses(rules.without_conflicts, nics)


@pytest.mark.parametrize("field", ["address", "forwards", "dns", "host_name"])
def test_options_of_local_interfaces(field: str) -> None:
    """Another interface has none of them."""
    options: dict[str, object] = {
        "address": Prefix(address=bytes((10, 0, 0, 1)), length=31), "forwards": (Forward(port=80, to=80),),
        "dns": (bytes((9, 9, 9, 9)),), "host_name": "web",
    }  # fmt: skip
    nic = NicConfig(local=True).replace(**{field: options[field]})

    assert rules.local_options(nic) == nic
    refuses(rules.local_options, nic.replace(local=False))


@pytest.mark.parametrize("size", [4, 16])
def test_name_servers_of_an_interface(size: int) -> None:
    """Three of each family."""
    servers = [bytes((number,) * size) for number in range(1, 5)]
    rules.local_options(NicConfig(local=True, dns=tuple(servers[:3])))
    refuses(rules.local_options, NicConfig(local=True, dns=tuple(servers)))
    refuses(rules.local_options, NicConfig(local=True, dns=(bytes(5),)))


def test_a_routing_domain_has_no_forwards() -> None:
    """Its packets do not come from the host's own table; 0 is that."""
    nic = NicConfig(local=True, forwards=(Forward(port=80, to=80),))
    rules.local_options(nic.replace(rdomain=0))
    refuses(rules.local_options, nic.replace(rdomain=5))


@pytest.mark.parametrize(
    ("address", "length", "valid"),
    [
        ((10, 0, 0, 0), 8, True), ((10, 0, 0, 0), 7, True), ((10, 0, 0, 0), 6, False), ((0, 0, 0, 0), 0, True),
        ((10, 1, 0, 0), 16, True), ((10, 1, 0, 0), 15, False), ((10, 0, 0, 0), -1, False), ((10, 0, 0), 8, False),
        ((10, 0, 0, 0, 0), 8, False),
    ],
)  # fmt: skip
def test_networks(address: tuple[int, ...], length: int, valid: bool) -> None:
    """A network has no bits set behind its prefix: that of a plan, and that after `from`."""
    prefix = Prefix(address=bytes(address), length=length)
    plan, forward = VmConfig(name="a", plan_prefix4=prefix), Forward(port=1, to=1, source=prefix)
    if valid:
        rules.plan(plan)
        assert rules.forward(forward) == forward
    else:
        refuses(rules.plan, plan)
        refuses(rules.forward, forward)


def test_longest_prefixes() -> None:
    """A plan needs room for the addresses of a VM; clients of a forward may be a single host."""
    ten, six = bytes((10, 0, 0, 0)), b"\xfd" + bytes(15)
    host = Prefix(address=ten, length=32)
    assert rules.forward(Forward(port=1, to=1, source=host)).source == host
    refuses(rules.forward, Forward(port=1, to=1, source=host.replace(length=33)))
    for field, address, most in (("plan_prefix4", ten, 16), ("plan_prefix6", six, 60)):
        prefix = Prefix(address=address, length=most)
        config = VmConfig(name="a", plan_prefix4=host.replace(length=8), plan_prefix6=Prefix(address=six, length=48))
        rules.plan(config.replace(**{field: prefix}))
        refuses(rules.plan, config.replace(**{field: prefix.replace(length=most + 1)}))
        other = six if address is ten else ten
        refuses(rules.plan, config.replace(**{field: Prefix(address=other, length=8)}))
