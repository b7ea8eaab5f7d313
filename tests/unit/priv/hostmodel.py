"""A model of a host's network: interfaces, addresses, routes, settings and nftables, without a kernel."""

import errno
import ipaddress
from collections.abc import Collection
from typing import Any

import pytest

from vmd.errors import HostError, OperatorError, VmdError
from vmd.ipc.messages.priv import ConfigureNetwork, MakeNics, NicWanted, SwitchRequest
from vmd.log import log
from vmd.priv import groups, host, nics, rules, sysctl, tap
from vmd.priv.firewalls import Chain
from vmd.priv.host import HostNetwork
from vmd.priv.ifconfig import Route
from vmd.priv.lists import Link

LLADDR = bytes.fromhex("fee1bad10203")
HOST4, GUEST4 = bytes((100, 64, 3, 2)), bytes((100, 64, 3, 3))
PREFIX6 = bytes.fromhex("fd000000000000010000000000000000")
LAN = SwitchRequest(interface="br0", alias="switch1-lan")
OF_EACH = (
    ("ipv6/conf/%s/accept_ra", "1"), ("ipv6/conf/%s/disable_ipv6", "0"), ("ipv6/conf/%s/addr_gen_mode", "0"),
    ("ipv6/conf/%s/forwarding", "0"), ("ipv4/conf/%s/forwarding", "0"), ("ipv4/conf/%s/rp_filter", "0"),
)  # fmt: skip


class Nft:
    """nftables: our table as it was written last, and the chains of others.  `refused` rules are errors."""

    def __init__(self) -> None:
        self.path: str | None = "/usr/sbin/nft"
        self.text = ""  # of our table; "": there is none
        self.writes = 0
        self.refused: set[str] = set()
        self.others: list[Chain] = []
        self.translating: set[str] = set()
        self.lost: set[str] = set()  # what our table lacks
        self.counts: dict[str, dict[str, int]] = {}
        self.netdev: dict[str, str] = {}  # filters of taps

    def apply(self, text: str) -> None:
        """Write our table, or the filters of a tap."""
        if any(word in text for word in self.refused):
            raise OperatorError(errno.EOPNOTSUPP, "nftables cannot be used: refused")
        if text.startswith("add table netdev"):
            self.netdev[text.split()[3]] = text
        elif text.startswith("add table"):
            self.text, self.writes = text, self.writes + 1

    def delete_table(self, name: str = rules.TABLE) -> None:
        """Delete a table."""
        if name == rules.TABLE:
            self.text = ""
        else:
            del self.netdev[name.split()[1]]

    def tables(self) -> list[str]:
        """Return all tables."""
        return [f"table netdev {name}" for name in self.netdev] + [f"table {rules.TABLE}"] * self.has_table()

    def has_table(self) -> bool:
        """Return whether our table exists."""
        return bool(self.text)

    def chains(self) -> list[Chain]:
        """Return the chains of others."""
        if "chains" in self.refused:
            raise OperatorError(errno.EIO, "no chains")
        return self.others

    def translates(self, table: str) -> bool:
        """Return whether a table of others has NAT."""
        return table in self.translating

    def shape(self) -> dict[str, int]:
        """Return what our table has."""
        if not self.text or "shape" in self.refused:
            raise OperatorError(errno.ENOENT, "no table")
        return {name: count for name, count in rules.shape(self.text).items() if name not in self.lost}

    def counters(self) -> dict[str, dict[str, int]]:
        """Return the counters of our table."""
        if "counters" in self.refused:
            raise OperatorError(errno.ENOENT, "no table")
        return self.counts

    def listing(self, *_what: str) -> str:
        """Return nothing that can be read."""
        return ""


class Kernel:
    """Stands for the interfaces (`vmd.priv.ifconfig.Links`) and the settings of the kernel."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self.settings = {"ipv4/ip_forward": "0"} | {name % "all": value for name, value in OF_EACH}
        self.there: list[tuple[int, bytes, int]] = []  # index, address, prefix length
        self.routes: dict[tuple[str, int], Route] = {}  # by destination and VRF
        self.ended: set[int] = set()  # routing tables that end
        self.shared: set[int] = set()
        self.refused: dict[str, int] = {}  # what fails: errnos by call and name
        self.taps: dict[int, int] = {}  # index of the interface by descriptor
        self.attached: dict[int, str] = {}
        self.made = 0
        self.add("lo", "", up=True)

    def add(self, name: str, kind: str, **more: Any) -> Link:  # noqa: ANN401  (any field of Link)
        """Add an interface, with its settings."""
        self.made += 1
        given: dict[str, Any] = {"alias": "", "master": 0, "mtu": 1500, "lladdr": LLADDR, "up": False} | more
        self.links[self.made] = link = Link(index=self.made, name=name, kind=kind, **given)
        self.settings |= {setting % name: value for setting, value in OF_EACH}
        return link

    def remove(self, index: int) -> None:
        """Remove an interface, its addresses and settings.  Its members have no master any more."""
        link = self.links.pop(index)
        self.there = [each for each in self.there if each[0] != index]
        for setting, _ in OF_EACH:
            del self.settings[setting % link.name]
        for other in self.links.values():
            if other.master == index:
                self.links[other.index] = other.replace(master=0)

    def named(self) -> dict[str, Link]:
        """Return the interfaces by name."""
        return {link.name: link for link in self.links.values()}

    def show(self) -> set[str]:
        """Return a line for each interface but `lo`: name, alias, master, and whether it is up."""
        names = {index: link.name for index, link in self.links.items()} | {0: "-"}
        lines = {
            f"{link.name} {link.alias or '-'} {names[link.master]} {'up' if link.up else 'down'}"
            for link in self.links.values()
        }
        return lines - {"lo - - up"}

    def addresses_of(self, name: str) -> set[str]:
        """Return the addresses of an interface."""
        index = self.named()[name].index
        return {f"{ipaddress.ip_address(address)}/{length}" for each, address, length in self.there if each == index}

    def _may(self, what: str, name: str) -> None:
        number = self.refused.get(f"{what} {name}")
        if number is not None:
            raise HostError(f"{what} {name}", number)

    def _set(self, what: str, link: Link, **changed: object) -> None:
        self._may(what, link.name)
        self.links[link.index] = self.links[link.index].replace(**changed)

    # --- as `Links` ----------------------------------------------------------------------------------------

    def all(self) -> list[Link]:
        """List all."""
        self._may("list", "all")
        return list(self.links.values())

    def find(self, name: str) -> Link | None:
        """Find one."""
        return self.named().get(name)

    def get(self, name: str) -> Link:
        """Get one."""
        return self.named()[name]

    def members(self, master: Link) -> list[Link]:
        """List the members of a bridge or VRF."""
        return [link for link in self.links.values() if link.master == master.index]

    def add_bridge(self, name: str, alias: str) -> Link:
        """Make a bridge."""
        self._may("add", name)
        return self.add(name, "bridge", alias=alias)

    def add_vrf(self, name: str, table: int, alias: str) -> Link:
        """Make a VRF."""
        self._may("add", name)
        return self.add(name, "vrf", table=table, alias=alias)

    def delete(self, link: Link) -> None:
        """Delete an interface."""
        self._may("delete", link.name)
        self.remove(link.index)

    def set_alias(self, link: Link, alias: str) -> None:
        """Set the alias."""
        self._set("alias", link, alias=alias)

    def set_group(self, link: Link, group: int) -> None:
        """Set the group."""
        self._set("group", link, group=group)

    def set_lladdr(self, link: Link, lladdr: bytes) -> None:
        """Set the address."""
        self._set("lladdr", link, lladdr=lladdr)

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the MTU."""
        self._set("mtu", link, mtu=mtu)

    def set_master(self, link: Link, master: Link) -> None:
        """Put it into a bridge or VRF."""
        self._set("master", link, master=master.index)

    def leave_master(self, link: Link) -> None:
        """Take it out."""
        self._set("leave", link, master=0)

    def set_up(self, link: Link, *, up: bool) -> None:
        """Switch it on or off."""
        self._set("up", link, up=up)

    def add_address(self, link: Link, address: bytes, length: int) -> None:
        """Add an address."""
        self._may("address", link.name)
        self.there.append((link.index, address, length))

    def delete_address(self, link: Link, address: bytes, length: int) -> None:
        """Remove an address."""
        self.there.remove((link.index, address, length))

    def addresses(self, besides: Collection[int] = ()) -> list[tuple[int, bytes]]:
        """List addresses."""
        return [(index, address) for index, address, _ in self.there if index not in besides]

    def route_to(self, address: bytes, inside: int = 0) -> Route | None:
        """Look up a route."""
        return self.routes.get((str(ipaddress.ip_address(address)), inside))

    def name_of(self, index: int) -> str:
        """Return the name of an interface."""
        return self.links[index].name

    def shared_table(self, table: int) -> bool:
        """Return whether a routing rule leads to a table."""
        return table in self.shared

    def end_table(self, table: int) -> None:
        """End a routing table."""
        self._may("end", str(table))
        self.ended.add(table)

    def forget_routes(self, table: int | None = None) -> None:
        """Delete the ends of routing tables."""
        self.ended = set() if table is None else self.ended - {table}

    # --- taps and settings ---------------------------------------------------------------------------------

    def make_tap(self, fd: int, name: str, reserved: Collection[str] = ()) -> str:
        """Make a tap behind a descriptor."""
        if name in self.named():
            raise OperatorError(errno.EBUSY, f"interface {name} exists already")
        free = (each for number in range(9) if (each := f"tap{number}") not in reserved and each not in self.named())
        self.taps[fd] = self.add(name or next(free), "tun").index
        return self.links[self.taps[fd]].name

    def attach_tap(self, fd: int, name: str) -> None:
        """Attach a descriptor to a tap."""
        self.attached[fd] = name

    def close(self, fd: int) -> None:
        """Close a descriptor: its tap is gone, unless another program has made the tap."""
        index = self.taps.pop(fd, None)
        self.attached.pop(fd, None)
        if index in self.links:
            self.remove(index)

    def write(self, name: str, value: str) -> None:
        """Change a setting."""
        self._may("write", name)
        assert name in self.settings
        self.settings[name] = value

    def entries(self, directory: str) -> list[str]:
        """List a directory of settings."""
        found = (name[len(directory) + 1 :] for name in self.settings if name.startswith(f"{directory}/"))
        return sorted({name.partition("/")[0] for name in found})


class Host:
    """A host, the network that vmd makes on it, and the lines of its log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
        self.kernel, self.nft = Kernel(), Nft()
        self.groups: dict[str, int] = {}
        self.said: list[str] = []
        self.fds = iter(range(1000, 2000))
        for place, name, stand_in in (
            (host, "Links", lambda: self.kernel), (host, "Nft", lambda: self.nft), (host, "close", self.kernel.close),
            (nics, "close", self.kernel.close), (tap, "make", self.kernel.make_tap),
            (tap, "attach", self.kernel.attach_tap), (groups, "number", self.groups.get),
            (sysctl, "state_path", lambda: state), (sysctl, "write", lambda *given: self.kernel.write(*given)),
            (sysctl, "read", lambda name: self.kernel.settings.get(name)),
            (sysctl, "entries", lambda directory: self.kernel.entries(directory)),
            (log, "warn", self.said.append), (log, "error", self.said.append),
            (log, "info", self.said.append),
        ):  # fmt: skip
            monkeypatch.setattr(place, name, stand_in)
        self.network = HostNetwork()
        self.network.nat = True

    def tuns(self, count: int) -> list[int]:
        """Return descriptors."""
        return [next(self.fds) for _ in range(count)]


def wanted(vmid: int = 3, index: int = 0, **more: object) -> NicWanted:
    """Return a request for an interface."""
    lladdr = LLADDR[:4] + bytes((vmid, index))
    return NicWanted(name="", alias=f"vm{vmid}-if{index}-web", lladdr=lladdr).replace(**more)


LOCAL = wanted(host4=HOST4, guest4=GUEST4)
LOCAL6 = wanted(prefix6=PREFIX6)


def configure(host: Host, *switches: SwitchRequest, nat: bool = True) -> list[str]:
    """Configure switches.  Return the problems."""
    return host.network.configure(ConfigureNetwork(nat=nat, switches=switches))


def start(host: Host, *nics: NicWanted, vmid: int = 3, reserved: tuple[str, ...] = ()) -> list[int]:
    """Make the interfaces of a VM, and hand them over.  Return their descriptors."""
    tuns = host.tuns(len(nics))
    left = list(tuns)
    message = MakeNics(vmid=vmid, ticket=1, nics=nics, reserved=reserved)
    try:
        made = host.network.make_nics(message, left)
    except (OperatorError, HostError):
        for fd in left:
            host.kernel.close(fd)
        raise
    assert left == []
    assert [nic.take_fd() for nic in made] == tuns
    return tuns


def refused(host: Host, *nics: NicWanted, vmid: int = 3) -> VmdError:
    """Return the error for a VM whose interfaces cannot be made.  It leaves nothing."""
    before = host.kernel.show(), sorted(host.kernel.there), host.nft.text
    held = dict(host.kernel.taps), dict(host.kernel.attached)
    with pytest.raises((OperatorError, HostError)) as error:
        start(host, *nics, vmid=vmid)
    assert (host.kernel.show(), sorted(host.kernel.there), host.nft.text) == before
    assert vmid not in host.network.nics
    assert (host.kernel.taps, host.kernel.attached) == held
    return error.value
