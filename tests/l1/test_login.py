"""From an image to a login: a Debian with cloud-init, made from packages, run like a cloud image.

One guest starts twice, and its clone once.  Each start takes minutes in the emulated machine, and longer in parallel.
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
CONSOLE_SHOWN = 8000  # characters of a guest's last output
GIB = 1 << 30
SIZE = "3G"
MARK = "@@"
USER, HOSTNAME, PORT = "ann", "www", 8022
RESOLVER = "203.0.113.53"
RESULT = "/run/cloud-init/result.json"  # cloud-init writes this file after its last stage
# A login takes seconds in the emulated machine, so one login asks everything.  A step that cloud-init does once per
# instance leaves a file in `sem`.  The file's time says when the step was done.
QUESTIONS = {
    "cloud-init": f"until [ -e {RESULT} ]; do sleep 1; done; cat {RESULT}",
    "id": "id",
    "root": "sudo id -u",
    "hostname": "hostname",
    "bytes": "df -B1 --output=size / | tail -1",
    "addresses": "ip -j -4 address show scope global",
    "routes": "ip -j -4 route show default",
    "dns": "resolvectl dns",
    "instance": "cat /var/lib/cloud/data/instance-id",
    "once": "sudo ls --full-time /var/lib/cloud/instance/sem",
}
# Devices and units that are ready after a second on hardware take minutes here.
PATIENCE = f"systemd.default_timeout_start_sec={BOOT_S} systemd.default_device_timeout_sec={BOOT_S}"
SILENCE = "quiet systemd.show_status=false"  # each character on the console costs an exit to the host
STRANGER = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")


class Lab:
    """A host with a daemon, the network outside, and an ssh key."""

    def __init__(self, folder: Path, host: Network, world: Network, vmd: NetDaemon) -> None:
        self.folder = folder
        self.key = folder / "key"
        self.host = host
        self.world = world
        self.vmd = vmd

    def logs_in(self, name: str, command: str) -> str:
        """Run a command in a guest by `vmctl ssh`.  Return its output."""
        words = ["ssh", "-w", str(BOOT_S), "-i", str(self.key), "-o", "IdentitiesOnly=yes", name, "--", command]
        with self.host.inside():
            done = self.vmd.vmctl(*words, timeout_s=BOOT_S + 300)
        printed = (self.folder / f"{name}.log").read_text(errors="replace")[-CONSOLE_SHOWN:]
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.vmd.log}\n{printed}"
        return done.stdout.strip()

    def logs_in_from(self, network: Network, address: str) -> str:
        """Run id(1) in the guest by ssh to the forwarded port.  Return its output."""
        words = ["-i", str(self.key), "-o", "IdentitiesOnly=yes", *STRANGER, "-p", str(PORT), f"{USER}@{address}", "id"]
        return network.run("ssh", *words).strip()

    def starts(self, name: str) -> dict[str, str]:
        """Start a VM, wait until cloud-init has finished, and return the guest's answers."""
        began = time.monotonic()
        self.vmd.must("start", name)
        said = self.logs_in(name, "; ".join(f"echo {MARK} {key}; {command}" for key, command in QUESTIONS.items()))
        print(f"{name}: logged in to, and set up, after {time.monotonic() - began:.0f} s")
        parts = (part.partition("\n") for part in said.split(f"{MARK} ")[1:])
        answers = {key: answer.strip() for key, _, answer in parts}
        assert json.loads(answers["cloud-init"])["v1"]["errors"] == []
        return answers

    def stops(self, name: str) -> None:
        """Stop a VM by its power button, and wait for its end."""
        self.vmd.must("stop", "-w", name, timeout_s=BOOT_S)
        assert self.vmd.status(name)["text"] == "powered off by the guest"


def block(name: str, disk: Path, folder: Path, forward: str = "", hostname: str = "") -> str:
    """Return the block of a VM with this disk and a seed.  The kernel comes from the disk."""
    return f"""
vm "{name}" {{
    disable
    memory 512M
    {debian_image.BOOT} cmdline "{debian_image.CMDLINE} {SILENCE} {PATIENCE}"
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
    subprocess.run(["modprobe", "-q", "nft_ct"], check=False)  # needed by the rules for forwarded ports
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
    """The guest follows its seed, can be reached, does nothing twice, and its clone has another identity."""
    first = lab.starts("web")

    assert f"({USER})" in first["id"]
    assert lab.logs_in_from(lab.host, HOST) == lab.logs_in_from(lab.world, HOST) == first["id"]
    assert first["hostname"] == HOSTNAME
    assert first["root"] == "0"
    assert int(first["bytes"]) > 2.5 * GIB
    (nic,) = lab.vmd.interfaces("web")
    (address,) = json.loads(first["addresses"])
    assert nic["guest4"] in [each["local"] for each in address["addr_info"]]
    (route,) = json.loads(first["routes"])
    assert route["gateway"] == nic["host4"]
    assert RESOLVER in first["dns"]
    assert nic["lease"]["hostname"] == HOSTNAME

    lab.stops("web")
    second = lab.starts("web")

    assert (second["instance"], second["once"]) == (first["instance"], first["once"])

    lab.stops("web")
    lab.vmd.must("clone", "web", "copy")
    lab.vmd.conf.write_text(lab.vmd.conf.read_text() + block("copy", lab.folder / "copy-disk0", lab.folder))
    lab.vmd.must("reload")
    copy = lab.starts("copy")

    assert copy["instance"] != first["instance"]
    assert copy["once"] != first["once"]
    assert f"({USER})" in copy["id"]
    lab.stops("copy")
