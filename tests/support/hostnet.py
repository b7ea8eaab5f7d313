"""What a test sees of a host's network, and a daemon that lives in one of its own."""

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
    """Have what networks are made of, where it is not built in: nobody in a namespace can have it loaded."""
    for module in MODULES:
        subprocess.run(["modprobe", "-q", module], check=False)


class NetDaemon(Daemon):
    """A daemon whose host's network is this one, and whose name servers are these, if they are given."""

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
        """`numbers` are those that local addresses of root's VMs follow from, as if an earlier daemon had left them.

        `vhost_net`: there is a /dev/vhost-net, which knows no request.
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
        """Start it in there."""
        with self.network.inside():
            super().start()

    def interfaces(self, name: str) -> list[dict[str, Any]]:
        """Return what `vmctl status -v --json` says of a VM's interfaces."""
        (row,) = json.loads(self.must("status", "-v", "--json", name))["vms"]
        found: list[dict[str, Any]] = row["interfaces"]
        return found


@contextlib.contextmanager
def switched_off(vmd: Daemon, tap: Interface) -> Iterator[None]:
    """Have a tap be down inside, for as long as it takes; priv, which would put that right, waits."""
    priv = vmd.processes()["vmd: priv"]
    os.kill(priv, signal.SIGSTOP)
    try:
        tap.set("down")
        yield
    finally:
        tap.set("up")
        os.kill(priv, signal.SIGCONT)


def with_name_servers(directory: Path, servers: Sequence[str]) -> list[str]:
    """Return a prefix for a program that is to find these in /etc/resolv.conf, whatever the host has there."""
    etc = directory / "etc"
    etc.mkdir()
    (etc / "resolv.conf").write_text("".join(f"nameserver {server}\n" for server in servers))
    mount = f"mount -t overlay -o lowerdir={shlex.quote(str(etc))}:/etc overlay /etc"
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']


def with_vhost_net(directory: Path) -> list[str]:
    """Return a prefix for a program that is to find a /dev/vhost-net, which is /dev/null."""
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
    """Return all that can only have come from vmd."""
    found = [
        f"{name} ({link['ifalias']})" for name, link in links(network).items() if ALIAS.match(link.get("ifalias", ""))
    ]
    if "table inet vmd" in network.run("nft", "list", "tables").splitlines():
        found.append("table inet vmd")
    return found


def state_file(network: Network) -> Path:
    """Return where a daemon in this network notes what it has to put back."""
    with network.inside():
        return Path(state_path())


def setting(network: Network, name: str) -> str:
    """Return a kernel setting."""
    return network.run("cat", f"/proc/sys/net/{name}").strip()


def rules(network: Network) -> str:
    """Return our table as one line."""
    return " ".join(network.run("nft", "list", "table", "inet", "vmd").split())
