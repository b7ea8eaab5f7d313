"""Networking with two guests with Debian's stock kernel: all kinds of interfaces, and the world behind NAT."""

import contextlib
import ipaddress
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.hostnet import NetDaemon, load_modules, ours
from tests.support.linux import LinuxGuest
from tests.support.network import Network
from tests.support.shell import Shell, interrupts, version_1

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.timeout(900)]

BOOT_S = 200
MIB = 1 << 20

# The network beyond the host's only uplink.  It has no route to a guest.
HOST, WORLD, RESOLVER = "203.0.113.1", "203.0.113.2", "203.0.113.53"
HOST6, WORLD6 = "2001:db8:1::1", "2001:db8:1::2"
ADDRESSES = (ipaddress.ip_address(WORLD).packed, ipaddress.ip_address(WORLD6).packed)
NAME = "files.world.example"
SINK_PORT = 9

SMALL, LARGE = 5, 100  # MiB
TRIES = 5
MTUS = {"eth1": 1500, "eth2": 9000, "eth3": 16384}
IPXE = Path("/usr/lib/ipxe/ipxe.iso")
OLD, NEW = 1, 2  # vm ids, and last bytes of addresses
CONF = """
local inet6 prefix fd42:1:2::/48
switch "lan" {
    interface br0
}
switch "jumbo" {
    interface jumbo
}
switch "giant" {
    interface giant
}
"""


class Guest:
    """A guest at its shell.  Its first interface is `local`, and each further one is on a switch."""

    def __init__(self, vmd: NetDaemon, name: str, number: int, shell: Shell) -> None:
        self.vmd = vmd
        self.name = name
        self.number = number
        self.shell = shell
        self.run = shell.run
        self.tried = shell.tried
        self.wait_for = shell.wait_for

    def address(self, interface: str) -> str:
        """Return the guest's address on the switch of an interface."""
        return f"10.0.{interface.removeprefix('eth')}.{self.number}"

    def set_addresses(self) -> None:
        """Set the addresses on all switches."""
        for interface in MTUS:
            self.run(f"ip link set {interface} up && ip address add {self.address(interface)}/24 dev {interface}")

    def nic(self, index: int) -> dict[str, object]:
        """Return the entry of an interface in vmctl's output."""
        return self.vmd.interfaces(self.name)[index]

    def counters(self, index: int) -> dict[str, int]:
        """Return the counters of an interface in vmctl's output."""
        found = self.nic(index)["counters"]
        assert isinstance(found, dict)
        return found

    def statistics(self, interface: str) -> dict[str, int]:
        """Return the counters of an interface in the guest's kernel."""
        keys = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")
        said = self.run(f"cd /sys/class/net/{interface}/statistics && cat {' '.join(keys)}; cd /").split()
        return dict(zip(keys, map(int, said), strict=True))

    def pings(self, address: str, options: str = "", count: int = 3) -> str:
        """Ping an address `count` times, and wait for each answer.  Return the output of ping(8).

        Each ping is a separate command.  In a series, ping(8) waits for the last answer only as long as the slowest one
        before took, which is too short here.
        """
        one = f"ping {options} -c 1 -W 20 {address}"
        return self.run(f"(for i in $(seq {count}); do {one} || exit 1; done)")

    def fetches(self, mebibytes: int, address: str = WORLD) -> None:
        """Download a large file from the world, and send it back.  Check the contents both times."""
        wanted = servers.md5(servers.noise(mebibytes))
        began = time.monotonic()
        got = self.run(f"wget -q -O /tmp/file http://{address}/{mebibytes} && md5sum </tmp/file", 300)
        there = time.monotonic()
        took = self.run(f"nc {address} {SINK_PORT} </tmp/file; rm /tmp/file", 300)
        back = time.monotonic()
        print(f"{self.name}: {mebibytes} MiB received in {there - began:.1f} s, sent in {back - there:.1f} s")
        assert (got.split()[0], took) == (wanted, wanted)

    def moves(self, mebibytes: int) -> tuple[float, float]:
        """Call `fetches`.  Return the average length of received and sent frames on the local interface, in bytes."""
        before = self.counters(0)
        self.fetches(mebibytes)
        after = self.counters(0)
        more = {key: after[key] - before[key] for key in after}
        return more["rx_bytes"] / more["rx_packets"], more["tx_bytes"] / more["tx_packets"]

    def leases(self) -> str:
        """Get an address for the local interface by DHCP.  Return the lease."""
        self.run("ip address flush dev eth0; ip link set eth0 up")
        return self.run("udhcpc -i eth0 -n -q -f -s /bin/leased 2>/dev/null")


class Lab:
    """The two guests, their host, and the world."""

    def __init__(self, vmd: NetDaemon, host: Network, world: Network, old: Guest, new: Guest) -> None:
        self.vmd = vmd
        self.host = host
        self.world = world
        self.old = old
        self.new = new

    @property
    def guests(self) -> tuple[Guest, Guest]:
        """Both of them."""
        return self.old, self.new


def bridge_address(interface: str) -> str:
    """Return the host's address on the switch of a guest's interface."""
    return f"10.0.{interface.removeprefix('eth')}.254"


def block(name: str, linux: LinuxGuest, append: str, *lines: str) -> str:
    """Return a vm block that boots the stock kernel to a shell."""
    append = f"console=ttyS0 quiet panic=-1 nowatchdog vmdtest=shell {append}"
    options = ("disable", f'boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "{append}"', "memory 384M", *lines)
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


def join(host: Network, world: Network) -> None:
    """Connect a host to the world by a pair of veth interfaces."""
    with world.inside():
        holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ip(8) names a namespace by a process in it
    with holder:
        host.run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "far", "netns", str(holder.pid))
    for network, name, addresses in (
        (host, "uplink", (f"{HOST}/24", f"{HOST6}/64")),
        (world, "far", (f"{WORLD}/24", f"{RESOLVER}/24", f"{WORLD6}/64")),
    ):
        for address in addresses:
            network.run("ip", "address", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
        network.run("ip", "link", "set", name, "up")


@pytest.fixture(scope="module")
def lab(linux: LinuxGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Both guests, at their shells and with addresses on the switches.  `old` has legacy registers and INTx."""
    load_modules()
    nics = ("local interface", 'interface switch "lan"', 'interface switch "jumbo"', 'interface switch "giant"')
    locked = 'interface { switch "lan", locked lladdr }'
    conf = CONF + block("old", linux, "pci=nomsi", "virtio legacy", *nics)
    conf += block("new", linux, "", "virtio modern", nics[0], locked, *nics[2:])
    with contextlib.ExitStack() as stack:
        host, world = stack.enter_context(Network()), stack.enter_context(Network())
        stack.callback(lambda: check_empty(host))
        join(host, world)
        for name, mtu in (("jumbo", MTUS["eth2"]), ("giant", MTUS["eth3"])):
            host.run("ip", "link", "add", name, "mtu", str(mtu), "type", "bridge")
            host.run("ip", "link", "set", name, "up")
        contents = {str(size): partial(servers.noise, size) for size in (SMALL, LARGE)}
        stack.enter_context(servers.names(world, RESOLVER, {NAME: ADDRESSES}))
        stack.enter_context(servers.files(world, WORLD, contents))
        stack.enter_context(servers.sink(world, WORLD, SINK_PORT))
        vmd = NetDaemon(tmp_path_factory.mktemp("lab"), host, conf, name_servers=["127.0.0.53", RESOLVER])
        stack.enter_context(vmd)
        began = time.monotonic()
        for name in ("old", "new"):
            vmd.must("start", name)
        guests = []
        for name, number in (("old", OLD), ("new", NEW)):
            console = stack.enter_context(vmd.attached(name))
            guests.append(Guest(vmd, name, number, Shell(console, BOOT_S)))
            print(f"{name}: shell after {time.monotonic() - began:.1f} s")
            guests[-1].set_addresses()
        for interface, bridge in zip(MTUS, ("br0", "jumbo", "giant"), strict=True):
            host.run("ip", "address", "add", f"{bridge_address(interface)}/24", "dev", bridge)
        yield Lab(vmd, host, world, guests[0], guests[1])


def check_empty(host: Network) -> None:
    """Raise AssertionError if vmd has left anything in the network."""
    assert ours(host) == []


def eui64(prefix: str, lladdr: str) -> str:
    """Return the address that a guest forms from a /64 and its link-layer address (RFC 4291, appendix A)."""
    raw = bytearray.fromhex(lladdr.replace(":", ""))
    raw[0] ^= 2
    suffix = int.from_bytes(raw[:3] + b"\xff\xfe" + raw[3:], "big")
    return str(ipaddress.ip_network(prefix)[suffix])


def test_local_interfaces(lab: Lab) -> None:
    """DHCP, the host, the world behind NAT, and names work.  `vmctl status -v` shows the traffic."""
    for guest in lab.guests:
        assert "no lease given" in lab.vmd.must("status", "-v", guest.name)
        nic = guest.nic(0)

        leased = guest.leases()

        assert leased.startswith(f"dhcp: eth0 {nic['guest4']}/31 router {nic['host4']} dns {RESOLVER} ")
        for address in (str(nic["host4"]), WORLD):
            guest.pings(address)
        assert WORLD in guest.run(f"nslookup {NAME}")
        assert guest.tried("nslookup nowhere.example")[1] != 0
        guest.fetches(SMALL, NAME)
        status = lab.vmd.must("status", "-v", guest.name)
        print(status)
        assert f"lease {nic['guest4']} given 20" in status
        assert "dropped" not in status
        assert guest.counters(0)["dhcp_acks"] == 1


@pytest.mark.deep
def test_a_lease_is_renewed(lab: Lab) -> None:
    """A client with an address sends its requests to the host, not by broadcast, and repeats them if necessary."""
    guest = lab.new
    guest.run("ip link set eth0 up; udhcpc -i eth0 -f -p /tmp/udhcpc -s /bin/leased >/tmp/leases 2>&1 &")
    guest.wait_for("grep -q 'lease of' /tmp/leases")
    before = guest.counters(0)["dhcp_acks"]

    guest.run("kill -USR1 $(cat /tmp/udhcpc)")

    guest.wait_for("[ $(grep -c 'lease of' /tmp/leases) -ge 2 ]")
    said = guest.run("kill $(cat /tmp/udhcpc); cat /tmp/leases")
    print(said)
    assert said.count(f"lease of {guest.nic(0)['guest4']} obtained from {guest.nic(0)['host4']}") >= 2
    assert guest.counters(0)["dhcp_acks"] > before


@pytest.mark.deep
def test_ipv6_configures_itself(lab: Lab) -> None:
    """SLAAC from our advertisement, the host's addresses, and the world behind NAT work."""
    for guest in lab.guests:
        nic = guest.nic(0)
        prefix = str(nic["prefix6"])
        guest.run("ip link set eth0 up")
        guest.wait_for("ip -6 address show dev eth0 | grep -q 'scope global'")
        guest.wait_for("! ip -6 address show dev eth0 | grep -q tentative")

        own = guest.run("ip -6 address show dev eth0")
        routes = guest.run("ip -6 route")

        assert f"inet6 {eui64(prefix, str(nic['lladdr']))}/64 scope global" in own
        assert re.search(r"default via fe80:\S+ dev eth0", routes)
        for address in (str(ipaddress.ip_network(prefix)[1]), WORLD6):
            guest.pings(address, "-6")
        assert WORLD6 in guest.run(f"nslookup -type=aaaa {NAME}")


@pytest.mark.deep
def test_switches_and_their_sizes(lab: Lab) -> None:
    """Guests reach each other and the bridge's address with frames up to the MTU, without fragments."""
    for interface, mtu in MTUS.items():
        for guest, other in ((lab.old, lab.new), (lab.new, lab.old)):
            assert guest.run(f"cat /sys/class/net/{interface}/mtu").strip() == str(mtu)
            for address in (other.address(interface), bridge_address(interface)):
                assert f"{mtu - 20} bytes from" in guest.pings(address, f"-s {mtu - 28}")
    for guest in lab.guests:
        # Neither side has made fragments.
        keys, values = guest.run("grep ^Ip: /proc/net/snmp").splitlines()
        counts = dict(zip(keys.split(), values.split(), strict=True))
        assert {counts[name] for name in ("FragCreates", "ReasmReqds")} == {"0"}


@pytest.mark.deep
def test_a_locked_guest_that_changes_its_address(lab: Lab) -> None:
    """Its frames are dropped, and it gets no others' frames.  With its own address everything works again."""
    guest, other = lab.new, lab.old
    own = str(guest.nic(1)["lladdr"])
    guest.pings(other.address("eth1"))

    guest.run("ip link set eth1 down; ip link set eth1 address 02:00:00:00:00:09")
    before = guest.counters(1)
    guest.run("ip link set eth1 up")
    spoken = guest.tried(f"ping -c 2 -W 1 -i 0.2 {other.address('eth1')}")
    other.run("arp -i eth1 -s 10.0.1.77 02:00:00:00:00:09")
    heard = other.tried("ping -c 2 -W 1 -i 0.2 10.0.1.77")
    after = guest.counters(1)
    shown = lab.vmd.must("status", "-v", "new")
    guest.run(f"ip link set eth1 down; ip link set eth1 address {own}; ip link set eth1 up")
    print(shown)

    for said, ended in (spoken, heard):
        assert (ended, " 100% packet loss" in said) == (1, True)
    assert after["tx_packets"] == before["tx_packets"]
    assert after["tx_spoofed"] - before["tx_spoofed"] >= 2
    assert after["rx_filtered"] - before["rx_filtered"] >= 2
    dropped = re.search(r"dropped (\d+) from another address", shown)
    assert dropped is not None
    assert int(dropped[1]) >= after["tx_spoofed"]
    guest.pings(other.address("eth1"))


@pytest.mark.deep
def test_figures_are_true(lab: Lab) -> None:
    """The counters of vmctl equal those of the guest, in packets and bytes."""
    for guest in lab.guests:
        first = guest.counters(1)
        guest_before = guest.statistics("eth1")
        second = guest.counters(1)
        guest.pings(bridge_address("eth1"), "-s 1000", 20)
        third = guest.counters(1)
        guest_after = guest.statistics("eth1")
        last = guest.counters(1)
        for key, before in guest_before.items():
            assert third[key] - second[key] <= guest_after[key] - before <= last[key] - first[key]
        assert third["rx_packets"] - second["rx_packets"] >= 20


@pytest.mark.deep
def test_frames_are_finished_by_the_host_or_not(lab: Lab) -> None:
    """TCP is correct with frames up to 64 KiB and, with `csum=0 gso=0` for the driver, with frames up to the MTU."""
    for guest, size in ((lab.old, SMALL), (lab.new, LARGE)):
        guest.leases()
        most_received = most_sent = 0.0
        for _ in range(TRIES):  # a slow sender makes short frames
            received, sent = guest.moves(size)
            print(f"{guest.name}: on average {received:.0f} bytes in a received frame, {sent:.0f} in a sent one")
            most_received, most_sent = max(most_received, received), max(most_sent, sent)
            if min(most_received, most_sent) > 1514:
                break
        assert min(most_received, most_sent) > 1514
        guest.run("rmmod virtio_net && insmod /modules/virtio_net.ko csum=0 gso=0")
        guest.leases()
        received, sent = guest.moves(SMALL)
        print(f"{guest.name}: then {received:.0f} bytes in a received frame, {sent:.0f} in a sent one")
        assert sent < 1514
        guest.run("rmmod virtio_net && insmod /modules/virtio_net.ko")
        guest.set_addresses()


@pytest.mark.deep
def test_the_two_ways_to_a_device(lab: Lab) -> None:
    """Each guest uses the intended registers and interrupts."""
    for guest, version, kind in ((lab.old, "0", "IO-APIC"), (lab.new, "1", "PCI-MSI")):
        kinds = interrupts(guest.shell)
        print(kinds)
        assert version_1(guest.shell) == {version}
        assert set(kinds.values()) == {kind}


def ipxe_block(mode: str) -> str:
    """Return a vm block that boots iPXE from its CD.  iPXE then boots from the network."""
    return f"""
vm "{mode}" {{
    disable
    memory 128M
    virtio {mode}
    cdrom "{IPXE}"
    boot device net
    local interface
}}
"""


def ipxe_script(name: str, *commands: str) -> bytes:
    """Return a script of many packets.  It prints a sum, which shows that all of it was read, and runs commands."""
    steps = [number * number for number in range(1000)]
    lines = [
        "#!ipxe",
        "set sum:int32 0",
        *(f"inc sum {step}" for step in steps),
        f"iseq ${{sum:int32}} {sum(steps)} && echo {name} is whole",
        *commands,
    ]
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.mark.deep
def test_ipxe(tmp_path: Path) -> None:
    """iPXE's own driver boots from the network by DHCP, TFTP and HTTP, with legacy and modern registers."""
    first = ipxe_script(
        "auto_install",
        "imgfetch --name small tftp://${next-server}/large && imgstat && imgfree small",
        "imgfetch --name large http://${next-server}/large && imgstat && imgfree large",
        "chain http://${next-server}/second",
    )
    second = ipxe_script("second", "echo all is done", "prompt")
    contents: dict[str, servers.Content] = {"large": partial(servers.noise, 1), "second": lambda: [second]}
    everywhere = "0.0.0.0"
    modes = ("legacy", "modern")
    load_modules()
    with (
        Network() as host,
        servers.files(host, everywhere, contents),
        servers.tftp(host, everywhere, {"large": servers.PIECE[: MIB // 4], "auto_install": first}),
        NetDaemon(tmp_path, host, "".join(map(ipxe_block, modes))) as vmd,
        contextlib.ExitStack() as stack,
    ):
        began = time.monotonic()
        for mode in modes:
            vmd.must("start", mode)
        consoles = [stack.enter_context(vmd.attached(mode)) for mode in modes]
        for mode, console in zip(modes, consoles, strict=True):
            nic = vmd.interfaces(mode)[0]
            console.expect(f"net0: {nic['guest4']}/255.255.255.254 gw {nic['host4']}", BOOT_S)
            print(f"{mode}: has its address after {time.monotonic() - began:.1f} s")
            for words in (
                "auto_install is whole", f"small : {MIB // 4} bytes", f"large : {MIB} bytes", "second is whole",
                "all is done",
            ):  # fmt: skip
                console.expect(words, BOOT_S)
            print(f"{mode}: has its files after {time.monotonic() - began:.1f} s")
        status = vmd.must("status", "-v")
        print(status)
        assert len(re.findall(r"lease \S+ given 20", status)) == 2
        assert "dropped" not in status


@pytest.mark.deep
def test_a_large_file(lab: Lab) -> None:
    """100 MiB are received and sent back correctly."""
    for guest in lab.guests:
        guest.leases()
        guest.fetches(LARGE)
