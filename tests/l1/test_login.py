"""From an image to a login: a Debian with cloud-init, made from packages, as whoever has a cloud image would run it.

One guest, started twice, and a clone of it: each start takes minutes in here.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.l1.test_network import HOST, join
from tests.support.hostnet import NetDaemon, load_modules
from tests.support.network import Network
from tools import debian_image

pytestmark = [pytest.mark.l1, pytest.mark.deep, pytest.mark.root, pytest.mark.timeout(2400)]

BOOT_S = 900
CONSOLE_SHOWN = 8000  # characters, of what a guest has printed last
GIB = 1 << 30
SIZE = "3G"
USER, HOSTNAME, PORT = "ann", "www", 8022
RESOLVER = "203.0.113.53"
INSTANCE = "cat /var/lib/cloud/data/instance-id"
# What cloud-init does once in the life of an instance leaves a file here; this says when each was done.
ONCE = "sudo ls --full-time /var/lib/cloud/instance/sem"
# Devices and units that a processor of hardware has ready in a second take minutes here.
PATIENCE = f"systemd.default_timeout_start_sec={BOOT_S} systemd.default_device_timeout_sec={BOOT_S}"
STRANGER = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")


class Lab:
    """A host with a daemon, the world outside, and a key."""

    def __init__(self, folder: Path, host: Network, world: Network, vmd: NetDaemon) -> None:
        self.folder = folder
        self.key = folder / "key"
        self.host = host
        self.world = world
        self.vmd = vmd

    def logs_in(self, name: str, command: str) -> str:
        """Run a command in a guest by `vmctl ssh`; return what it said."""
        words = ["ssh", "-w", str(BOOT_S), "-i", str(self.key), "-o", "IdentitiesOnly=yes", name, "--", command]
        with self.host.inside():
            done = self.vmd.vmctl(*words, timeout_s=BOOT_S + 300)
        printed = (self.folder / f"{name}.log").read_text(errors="replace")[-CONSOLE_SHOWN:]
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.vmd.log}\n{printed}"
        return done.stdout.strip()

    def logs_in_from(self, network: Network, address: str) -> str:
        """Run id(1) in the guest by ssh to the port that is forwarded; return what it said."""
        words = ["-i", str(self.key), "-o", "IdentitiesOnly=yes", *STRANGER, "-p", str(PORT), f"{USER}@{address}", "id"]
        return network.run("ssh", *words).strip()

    def starts(self, name: str) -> None:
        """Start a VM, and wait until its guest has set itself up."""
        began = time.monotonic()
        self.vmd.must("start", name)
        self.logs_in(name, "true")
        logged_in = time.monotonic()
        status = self.logs_in(name, "cloud-init status --wait --long")
        print(f"{name}: login after {logged_in - began:.0f} s, cloud-init done after {time.monotonic() - began:.0f} s")
        assert "status: done" in status

    def stops(self, name: str) -> None:
        """Have the guest power off."""
        self.vmd.must("stop", "-w", name, timeout_s=BOOT_S)
        assert self.vmd.status(name)["text"] == "powered off by the guest"


def block(name: str, disk: Path, folder: Path, forward: str = "", hostname: str = "") -> str:
    """Return a VM with this disk and a seed; the kernel comes from the disk."""
    return f"""
vm "{name}" {{
    disable
    memory 512M
    {debian_image.BOOT} cmdline "{debian_image.CMDLINE} quiet {PATIENCE}"
    disk "{disk}"
    local interface{f" {{ {forward} }}" if forward else ""}
    seed {{ {hostname} user {USER} ssh-key "{folder}/key.pub" }}
    console log "{folder}/{name}.log"
}}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A VM `web` whose disk is a grown copy of the image."""
    load_modules()
    subprocess.run(["modprobe", "-q", "nft_ct"], check=False)  # for what is masqueraded with forwards
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    disk = tmp_path / "web.qcow2"
    conf = block("web", disk, tmp_path, f"forward tcp port {PORT} to port 22", f"hostname {HOSTNAME}")
    with contextlib.ExitStack() as stack:
        host, world = stack.enter_context(Network()), stack.enter_context(Network())
        join(host, world)
        vmd = stack.enter_context(NetDaemon(tmp_path, host, conf, name_servers=[RESOLVER]))
        vmd.must("create", "-i", debian_image.cached(), "-s", SIZE, disk, timeout_s=BOOT_S)
        yield Lab(tmp_path, host, world, vmd)


def test_an_image_a_seed_and_a_login(lab: Lab) -> None:
    """The guest is what the seed says, is reached, does nothing twice, and its clone is somebody else."""
    lab.starts("web")

    assert f"({USER})" in lab.logs_in("web", "id")
    assert lab.logs_in_from(lab.host, HOST) == lab.logs_in_from(lab.world, HOST) == lab.logs_in("web", "id")
    assert lab.logs_in("web", "hostname") == HOSTNAME
    assert lab.logs_in("web", "sudo id -u") == "0"
    assert int(lab.logs_in("web", "df -B1 --output=size / | tail -1")) > 2.5 * GIB
    (nic,) = lab.vmd.interfaces("web")
    (address,) = json.loads(lab.logs_in("web", "ip -j -4 address show scope global"))
    assert nic["guest4"] in [each["local"] for each in address["addr_info"]]
    (route,) = json.loads(lab.logs_in("web", "ip -j -4 route show default"))
    assert route["gateway"] == nic["host4"]
    assert RESOLVER in lab.logs_in("web", "resolvectl dns")
    assert nic["lease"]["hostname"] == HOSTNAME
    instance, once = lab.logs_in("web", INSTANCE), lab.logs_in("web", ONCE)

    lab.stops("web")
    lab.starts("web")

    assert (lab.logs_in("web", INSTANCE), lab.logs_in("web", ONCE)) == (instance, once)

    lab.stops("web")
    lab.vmd.must("clone", "web", "copy")
    lab.vmd.conf.write_text(lab.vmd.conf.read_text() + block("copy", lab.folder / "copy-disk0", lab.folder))
    lab.vmd.must("reload")
    lab.starts("copy")

    assert lab.logs_in("copy", INSTANCE) != instance
    assert lab.logs_in("copy", ONCE) != once
    assert f"({USER})" in lab.logs_in("copy", "id")
    lab.stops("copy")
