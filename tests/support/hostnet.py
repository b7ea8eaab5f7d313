"""A daemon in a network namespace of its own, and functions that show the state of such a network."""

import contextlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon
from tests.support.network import Interface, Network
from vmd.parent.identity import FILE, Identities
from vmd.priv.sysctl import state_path

MODULES = (
    "vrf", "tun", "bridge", "veth", "overlay", "nf_tables", "nft_chain_nat", "nft_masq", "nft_fib_inet", "nft_nat",
    "nft_objref", "vhost_net",
)  # fmt: skip
ALIAS = re.compile(r"vm\d+-if\d+-|switch\d+-|rdomain\d+$")


def load_modules() -> None:
    """Load the kernel modules for networks.  A process in a namespace cannot make the kernel load them."""
    for module in MODULES:
        subprocess.run(["modprobe", "-q", module], check=False)


class NetDaemon(Daemon):
    """A daemon in a network namespace, with other name servers if they are given."""

    def __init__(
        self,
        directory: Path,
        network: Network,
        conf: str = "",
        *,
        name_servers: Sequence[str] = (),
        numbers: Mapping[str, int] | None = None,
        vhost_net: bool = False,
    ) -> None:
        """`numbers` are the ids of root's VMs, the source of local addresses, as if an earlier daemon had stored them.

        `vhost_net`: /dev/vhost-net exists, but answers no request.
        """
        prefix = with_name_servers(directory, name_servers) if name_servers else []
        super().__init__(directory, conf, prefix=with_vhost_net(directory) if vhost_net else prefix)
        self.network = network
        if numbers:
            identities = Identities()
            for name, number in numbers.items():
                identities.of((name, 0)).number = number
            self.state.mkdir()
            (self.state / FILE).write_bytes(identities.encode())

    def start(self) -> None:
        """Start the daemon in its network."""
        with self.network.inside():
            super().start()

    def interfaces(self, name: str) -> list[dict[str, Any]]:
        """Return a VM's interfaces from `vmctl status -v --json`."""
        (row,) = json.loads(self.must("status", "-v", "--json", name))["vms"]
        found: list[dict[str, Any]] = row["interfaces"]
        return found


@contextlib.contextmanager
def switched_off(vmd: Daemon, tap: Interface) -> Iterator[None]:
    """Set a tap down while the context lasts.  priv is stopped meanwhile, because it would set the tap up again."""
    priv = vmd.processes()["vmd: priv"]
    os.kill(priv, signal.SIGSTOP)
    try:
        tap.set("down")
        yield
    finally:
        tap.set("up")
        os.kill(priv, signal.SIGCONT)


def with_name_servers(directory: Path, servers: Sequence[str]) -> list[str]:
    """Return a command prefix with which a program sees these servers in /etc/resolv.conf."""
    etc = directory / "etc"
    etc.mkdir()
    (etc / "resolv.conf").write_text("".join(f"nameserver {server}\n" for server in servers))
    mount = f"mount -t overlay -o lowerdir={shlex.quote(str(etc))}:/etc overlay /etc"
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']


def with_vhost_net(directory: Path) -> list[str]:
    """Return a command prefix with which a program sees /dev/null as /dev/vhost-net."""
    over, real = directory / "dev", directory / "real-dev"
    for each in (over, real):
        each.mkdir()
    os.mknod(over / "vhost-net", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    steps = [
        f"mount --rbind /dev {shlex.quote(str(real))}",
        f"mount -t overlay -o lowerdir={shlex.quote(str(over))}:/dev overlay /dev",
        *(f"mount --rbind {shlex.quote(str(real / name))} /dev/{name}" for name in ("pts", "shm")),
    ]
    return ["unshare", "--mount", "sh", "-c", " && ".join([*steps, 'exec "$0" "$@"'])]


def links(network: Network) -> dict[str, dict[str, Any]]:
    """Return every interface by name, as `ip` describes it."""
    return {link["ifname"]: link for link in json.loads(network.run("ip", "-j", "-d", "addr"))}


def addresses(link: dict[str, Any]) -> list[str]:
    """Return the addresses of an interface."""
    return [f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"]]


def ours(network: Network) -> list[str]:
    """Return everything in the network that only vmd can have made."""
    found = [
        f"{name} ({link['ifalias']})" for name, link in links(network).items() if ALIAS.match(link.get("ifalias", ""))
    ]
    if "table inet vmd" in network.run("nft", "list", "tables").splitlines():
        found.append("table inet vmd")
    return found


def state_file(network: Network) -> Path:
    """Return the file in which a daemon in this network records the settings that it must restore."""
    with network.inside():
        return Path(state_path())


def setting(network: Network, name: str) -> str:
    """Return a kernel setting."""
    return network.run("cat", f"/proc/sys/net/{name}").strip()


def rules(network: Network) -> str:
    """Return vmd's nftables table as one line."""
    return " ".join(network.run("nft", "list", "table", "inet", "vmd").split())
