"""A cluster of three hosts: corosync, pacemaker and vmd, in pid, mount, ipc, uts and net namespaces for each node.

The nodes share the file system of this host.  Its locks work between them, as on good shared storage.  A bridge in
another network namespace connects the nodes.  Pacemaker fences nodes with a program that only writes the request to a
file; `Cluster` then kills everything that the node runs.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.etree import ElementTree

from tests.support.daemon import ROOT

NAMES = ("n1", "n2", "n3")
DEADLINE_S = 300.0
POLL_S = 0.1
TOKEN_MS = 5000  # long, so that a busy host is not taken for a dead one

COROSYNC = """totem {
    version: 2
    cluster_name: vms
    transport: udpu
    token: %d
}
quorum {
    provider: corosync_votequorum
}
logging {
    to_stderr: no
    to_logfile: yes
    logfile: %s/corosync.log
}
nodelist {
%s}
"""
ACTIONS = {"monitor": 120, "start": 120, "stop": 120, "migrate_to": 240, "migrate_from": 120}  # timeouts, s
EACH_S = {"monitor": 2}
OPTIONS = {"allow-migrate": "true", "migration-threshold": "1000", "resource-stickiness": "100"}


def abort_fuse(mountinfo: str) -> None:
    """Abort the FUSE connections of a host that is switched off, so that nothing waits for them.

    A killed GlusterFS client can deadlock: it waits for a page that another process's request holds, and that request
    waits for the client.
    """
    rows = [line.split() for line in mountinfo.splitlines() if " - fuse." in line]
    orders = "".join(f"; echo 1 >$c/{row[2].partition(':')[2]}/abort" for row in rows)
    if orders:
        script = f"c=/sys/fs/fuse/connections; mount -t fusectl none $c {orders}"  # in a mount namespace of its own
        subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False, stderr=subprocess.DEVNULL)


def pairs(kind: str, owner: str, values: dict[str, str]) -> str:
    """Return attributes of a resource."""
    rows = "".join(f'<nvpair id="{owner}-{name}" name="{name}" value="{value}"/>' for name, value in values.items())
    return f'<{kind} id="{owner}-{kind}">{rows}</{kind}>'


def fence() -> str:
    """Return the fencing resource."""
    given = pairs("instance_attributes", "fence", {"pcmk_host_list": " ".join(NAMES)})
    return f'<primitive id="fence" class="stonith" type="fence_test">{given}</primitive>'


def resource(vm: str, shell: str) -> str:
    """Return the resource of a VM."""
    actions = "".join(
        f'<op id="{vm}-op-{name}" name="{name}" interval="{EACH_S.get(name, 0)}s" timeout="{timeout_s}s"/>'
        for name, timeout_s in ACTIONS.items()
    )
    given = pairs("instance_attributes", vm, {"shell": shell}) + pairs("meta_attributes", vm, OPTIONS)
    given += f"<operations>{actions}</operations>"
    return f'<primitive id="{vm}" class="ocf" provider="vmd" type="vm">{given}</primitive>'


def until(what: Callable[[], object], why: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, f"{why}: not so after {DEADLINE_S:.0f} s"
        time.sleep(POLL_S)


class Node:
    """One host; `init` is pid 1 of its namespaces, 0 while it is off."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.cluster = cluster
        self.name = NAMES[number]
        self.address = f"10.77.0.{number + 1}"
        self.directory = cluster.directory / self.name
        self.init = 0
        self.process: subprocess.Popen[str] | None = None
        self.lives = 0
        self.switch = threading.Lock()  # held to switch power: the test and the fencer both do

    def switch_on(self) -> None:
        """Start the node, with empty memory."""
        with self.switch:
            self._start()

    def _start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.lives += 1
        own = self.directory / f"life{self.lives}"
        own.mkdir()
        self.cluster.furnish(own)
        prefix = ["unshare", "--pid", "--mount", "--ipc", "--uts", "--net", "--fork", "--kill-child"]
        command = [*prefix, str(ROOT / "tests/cluster/node-init"), self.name, str(own), sys.executable, str(ROOT)]
        command.append(self.cluster.kind)
        with own.joinpath("init.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        assert self.process.stdout.readline() == "ready\n"
        pid = self.process.pid
        self.init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        self.cluster.plug(self)
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def own(self) -> Path:
        """The directory of the node since it was last switched on."""
        return self.directory / f"life{self.lives}"

    def switch_off(self) -> None:
        """Kill everything on the node at once, as a power cut does."""
        with self.switch:
            if self.process is None:
                return
            init, self.init = self.init, 0
            mounts = Path(f"/proc/{init}/mountinfo").read_text() if Path(f"/proc/{init}").exists() else ""
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)
            abort_fuse(mounts)
            self.process.wait()
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program on the node."""
        command = tuple(self.entered(*command)) if self.init else ("false",)  # the node may be fenced at any moment
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )

    def agent(self, vm: str, action: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Call the resource agent as the cluster does."""
        given = {"name": vm, "shell": self.cluster.shell, "CRM_meta_timeout": "120000", **more}
        words = [f"OCF_RESKEY_{name}={value}" for name, value in given.items()]
        return self.run("env", *words, "/usr/lib/ocf/resource.d/vmd/vm", action)

    def entered(self, *command: str | Path) -> list[str | Path]:
        """Return the command that runs a program on the node."""
        return ["nsenter", "-t", str(self.init), "-m", "-i", "-u", "-n", "-p", *command]

    def must(self, *command: str | Path) -> str:
        """Run a program that must succeed; return its output."""
        done = self.run(*command)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, vm: str) -> dict[str, Any]:
        """Return the status of a VM from the node's vmd; an empty row if vmd does not answer."""
        done = self.run("vmctl", "status", "--json", vm) if self.init else None
        if done is None or done.returncode:
            return {"state": "", "text": ""}
        row: dict[str, Any] = json.loads(done.stdout)["vms"][0]
        return row

    def host_pid(self, title: str) -> int:
        """Return the pid, in the host's namespace, of a process of the node."""
        children: dict[int, list[int]] = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
        family = [self.init]
        while family:
            pid = family.pop()
            family += children.get(pid, [])
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] == title.encode():
                    return pid
        raise AssertionError(f"{self.name} has no {title}")

    @contextlib.contextmanager
    def console(self, vm: str) -> Iterator[int]:
        """Open the pty of a VM on the node."""
        fd = os.open(f"/proc/{self.init}/root{self.state(vm)['tty']}", os.O_RDWR | os.O_NOCTTY)
        try:
            yield fd
        finally:
            os.close(fd)


class Cluster:
    """The nodes, their network and the fencer; a context manager."""

    kind = "pacemaker"

    def __init__(self, directory: Path, conf: str, vms: tuple[str, ...]) -> None:
        self.directory = directory
        self.conf = conf
        self.vms = vms
        self.fences = directory / "fences"
        self.fences.mkdir()
        self.fenced: list[str] = []
        self.shell = f"env PYTHONPATH={ROOT} {sys.executable} -m tests.cluster.node shell"
        self.nodes = [Node(self, number) for number in range(len(NAMES))]
        self.wire = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"], stdout=subprocess.PIPE, text=True
        )
        assert self.wire.stdout is not None
        with self.wire.stdout as said:
            assert said.readline() == "ready\n"  # before, `ip` would change the host's network
        self.ended = threading.Event()
        self.fencer = threading.Thread(target=self._fence, daemon=True)

    def __enter__(self) -> Self:
        try:
            self._wire("ip", "link", "add", "br0", "type", "bridge")
            self._wire("ip", "link", "set", "br0", "up")
            self.fencer.start()
            for node in self.nodes:
                node.switch_on()
            self._configure()
        except BaseException:
            self.show()
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.show()
        self.end()

    def end(self) -> None:
        """Switch everything off."""
        self.ended.set()
        for node in self.nodes:
            node.switch_off()
        self.wire.kill()
        self.wire.wait()

    def show(self) -> None:
        """Print logs that may explain a failure."""
        for node in self.nodes:
            for name in ("vmd.log", "init.log", "corosync.log", "pacemaker.log"):
                path = node.own / name
                if path.exists():
                    lines = path.read_text(errors="replace").splitlines()
                    shown = [line for line in lines if name != "pacemaker.log" or "error" in line or "vm(" in line]
                    print(f"--- {node.name} {name}", *shown[-40:], sep="\n")
        with contextlib.suppress(Exception):
            print(self.alive[0].run("crm_mon", "-1", "-A", "-f").stdout)

    # --- its parts ---------------------------------------------------------------------------------------------

    def _wire(self, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.wire.pid), "-n", *command], check=True)

    def furnish(self, own: Path) -> None:
        """Write the files of a node."""
        rows = "".join(
            f"    node {{\n        ring0_addr: {node.address}\n        name: {node.name}\n"
            f"        nodeid: {number}\n    }}\n"
            for number, node in enumerate(self.nodes, 1)
        )
        own.joinpath("corosync.conf").write_text(COROSYNC % (TOKEN_MS, own, rows))
        hosts = "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        own.joinpath("hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        own.joinpath("vm.conf").write_text(self.conf)
        here = f"#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m"
        for program in ("vmd", "vmctl"):
            own.joinpath(program).write_text(f'{here} {program} "$@"\n')
        own.joinpath("fence_test").write_text(f'{here} tests.cluster.node fence {self.fences} "$@"\n')
        shutil.copy(ROOT / "fleet/ocf_vm.py", own / "agent")

    def plug(self, node: Node) -> None:
        """Connect a node to the wire."""
        with contextlib.suppress(subprocess.CalledProcessError):  # usually gone with the node's last namespace
            subprocess.run(
                ["nsenter", "-t", str(self.wire.pid), "-n", "ip", "link", "del", node.name],
                check=True, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self._wire("ip", "link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", str(node.init))
        self._wire("ip", "link", "set", node.name, "master", "br0", "up")
        enter = ["nsenter", "-t", str(node.init), "-n"]
        subprocess.run([*enter, "ip", "address", "add", f"{node.address}/24", "dev", "eth0"], check=True)

    def cut(self, node: Node) -> None:
        """Pull a node's cable."""
        self._wire("ip", "link", "set", node.name, "down")

    def heal(self, node: Node) -> None:
        """Plug it in again."""
        self._wire("ip", "link", "set", node.name, "up")

    def _fence(self) -> None:
        """Switch off the nodes that pacemaker asks to fence."""
        while not self.ended.wait(POLL_S / 2):
            for asked in self.fences.iterdir():
                name = asked.name.partition(".")[0]
                node = next(node for node in self.nodes if node.name == name)
                self.fenced.append(name)
                node.switch_off()
                asked.unlink()

    def _configure(self) -> None:
        self.make_whole()
        first = self.nodes[0]
        first.must("cibadmin", "-C", "-o", "resources", "-X", fence())
        for name, value in (("stonith-enabled", "true"), ("no-quorum-policy", "stop"), ("stonith-action", "off")):
            first.must("crm_attribute", "-n", name, "-v", value)
        for vm in self.vms:
            first.must("cibadmin", "-C", "-o", "resources", "-X", resource(vm, self.shell))

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Node]:
        """The nodes that are on."""
        return [node for node in self.nodes if node.init]

    def online(self, node: Node) -> int:
        """Return how many nodes are online as one of them sees it."""
        done = node.run("crm_mon", "-1", "--output-as=xml")
        if done.returncode:
            return 0
        tree = ElementTree.fromstring(done.stdout)
        dc = tree.find("./summary/current_dc")
        if dc is None or dc.get("present") != "true":
            return 0
        return sum(each.get("online") == "true" and each.get("pending") == "false" for each in tree.iter("node"))

    def make_whole(self) -> None:
        """Switch on all nodes and wait until they are in the cluster.  A node that returns too soon gets fenced."""

        def is_whole() -> bool:
            for node in self.nodes:
                if not node.init:
                    node.switch_on()
            return all(self.online(node) == len(self.nodes) for node in self.nodes)

        until(is_whole, "all nodes are in the cluster")

    def running(self, vm: str) -> list[Node]:
        """Return the nodes whose vmd reports the VM as running."""
        return [node for node in self.alive if node.state(vm)["state"] == "running"]

    def wait_running(self, vm: str, *, but: Node | None = None) -> Node:
        """Wait until a VM runs on one node other than `but`; return that node."""
        found: list[Node] = []

        def runs() -> bool:
            found[:] = self.running(vm)
            assert len(found) < 2, f"{vm} runs at {[node.name for node in found]}"
            return bool(found) and found[0] is not but

        until(runs, f"{vm} runs")
        return found[0]

    def move(self, vm: str, to: Node) -> None:
        """Have the cluster move a VM."""
        to.must("crm_resource", "--move", "-r", vm, "-N", to.name)
        to.must("crm_resource", "--wait", "-r", vm, "--timeout=240")
        to.must("crm_resource", "--clear", "-r", vm)


class GlusterHosts(Cluster):
    """The same hosts without a cluster, with a GlusterFS volume of their own at /mnt of each."""

    kind = "gluster"
    place = "/mnt"

    def __init__(self, directory: Path, conf: str, *, replicas: tuple[str, ...], options: dict[str, str]) -> None:
        """`replicas`: number and kind of the bricks, as arguments of `gluster volume create`."""
        super().__init__(directory, conf, ())
        self.replicas = replicas
        self.options = options

    def _gluster(self, *words: str) -> None:
        self.nodes[0].must("gluster", "--mode=script", *words)

    def _configure(self) -> None:
        for node in self.nodes:
            node.directory.joinpath("brick").mkdir()
        until(lambda: not any(node.run("gluster", "pool", "list").returncode for node in self.nodes), "glusterd runs")
        for node in self.nodes[1:]:
            self._gluster("peer", "probe", node.name)
        until(
            lambda: all(
                node.run("gluster", "pool", "list").stdout.count("Connected") == len(NAMES) for node in self.nodes
            ),
            "all know one another",
        )
        bricks = [f"{node.name}:{node.directory}/brick" for node in self.nodes]
        self._gluster("volume", "create", "vms", *self.replicas, *bricks[: int(self.replicas[1])], "force")
        for name, value in self.options.items():
            self._gluster("volume", "set", "vms", name, value)
        self._gluster("volume", "start", "vms")
        for node in self.nodes:
            node.must("mount", "-t", "glusterfs", "localhost:/vms", self.place)
