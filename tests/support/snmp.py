"""Debian's SNMP agent and tools with their own files.  They use no SNMP file of this host."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.network import Network

DEADLINE_S = 100.0
AGENT, TRAPS = "127.0.0.1:1161", "127.0.0.1:1162"
CONTEXT = "vms"
MIB = ".1.3.6.1.2.1.236"
# `public` may read, `private` may also write, and `vms` reads in the context of that name.
AGENT_CONF = """
master agentx
agentXSocket {socket}
agentXTimeout 60
agentXRetries 0
rocommunity public 127.0.0.1
rwcommunity private 127.0.0.1
com2sec -Cn {context} reader 127.0.0.1 {context}
group readers v2c reader
view all included .1
access readers {context} v2c noauth exact all none none
trap2sink {traps} public
"""
SERVES = "NET-SNMP version"  # both daemons log this when they serve
TRAPS_CONF = "disableAuthorization yes\n"


class Agent:
    """An snmpd and an snmptrapd in their own network; a context manager."""

    def __init__(self, directory: Path, network: Network) -> None:
        self.directory = directory
        self.network = network
        self.socket = directory / "master"
        self.log = directory / "snmpd.log"
        self.traps = directory / "traps.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.listener: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ, "SNMP_PERSISTENT_DIR": str(directory / "persistent"), "MIBS": "", "SNMPCONFPATH": "/nowhere",
        }  # fmt: skip
        (directory / "snmpd.conf").write_text(AGENT_CONF.format(socket=self.socket, traps=TRAPS, context=CONTEXT))
        (directory / "snmptrapd.conf").write_text(TRAPS_CONF)

    def start(self) -> None:
        """Start the agent, and wait until it serves.  Senders repeat earlier packets only after half a minute."""
        before = self.log.read_text().count(SERVES) if self.log.exists() else 0
        self.process = self._run(
            "snmpd", "-f", "-r", "-LE", "6", "-C", "-c", self.directory / "snmpd.conf", "-p",
            self.directory / "snmpd.pid", AGENT, log=self.log,
        )  # fmt: skip
        wait_for(lambda: self.log.read_text().count(SERVES) > before, self.log)

    def listen(self) -> None:
        """Start the receiver of notifications."""
        self.listener = self._run(
            "snmptrapd", "-f", "-n", "-Lo", "-On", "-C", "-c", self.directory / "snmptrapd.conf", "-p",
            self.directory / "snmptrapd.pid", "-F", "%v\\n", TRAPS, log=self.traps,
        )  # fmt: skip
        wait_for(lambda: SERVES in self.traps.read_text(), self.traps)

    def _run(self, *command: str | Path, log: Path) -> "subprocess.Popen[bytes]":
        with self.network.inside(), log.open("ab") as file:
            return subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environment,
            )  # fmt: skip

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End the agent."""
        end(self.process, signum)
        self.process = None

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        end(self.listener)

    def ask(self, tool: str, community: str, *arguments: str) -> str:
        """Run an SNMP tool; return its output and errors, with numeric names."""
        with self.network.inside():
            command = [tool, "-v2c", "-c", community, "-On", "-Oe", "-OU", "-r", "12", "-t", "5", AGENT, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment)
        return done.stdout + done.stderr

    def walk(self, tool: str = "snmpbulkwalk", community: str = "public", root: str = MIB) -> dict[str, str]:
        """Return all variables below a root, each as `type: value`; keys are the rest of the name after the root."""
        return variables(self.ask(tool, community, root), root)

    def serves(self, community: str = "public") -> bool:
        """Return whether the agent serves VM-MIB."""
        return "STRING" in self.ask("snmpget", community, f"{MIB}.1.1.1.0")

    def wait_served(self, community: str = "public", *, served: bool = True) -> None:
        """Wait until the agent serves VM-MIB, or until it no longer does."""
        wait_for(lambda: self.serves(community) == served, self.log)

    def wait_heard(self, *wanted: str, since: int = 0) -> None:
        """Wait until exactly these VM-MIB notifications, by number and in this order, follow the first `since`.

        A test waits for all that it causes, so that none arrives while the next test counts.
        """
        wait_for(lambda: self.heard()[since:] == list(wanted), self.traps)

    def heard(self) -> list[str]:
        """Return the numbers of all received notifications of VM-MIB."""
        names = [each[".1.3.6.1.6.3.1.1.4.1.0"].removeprefix("OID: ") for each in self.notifications()]
        return [name.removeprefix(f"{MIB}.0.") for name in names if name.startswith(f"{MIB}.0.")]

    def notifications(self) -> list[dict[str, str]]:
        """Return all received notifications, in the form of `walk`."""
        lines = [line for line in self.traps.read_text().splitlines() if ".1.3.6.1.6.3.1.1.4.1.0" in line]
        return [variables("\n".join(line.split("\t")), "") for line in lines]


def variables(text: str, root: str) -> dict[str, str]:
    """Return the variables in a tool's output."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name.startswith(root):
            found[name.removeprefix(root)] = value.strip()
    return found


def wait_for(what: Callable[[], bool], log: Path) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        select.select([], [], [], 0.05)


def end(process: "subprocess.Popen[bytes] | None", signum: int = signal.SIGTERM) -> None:
    """End a process."""
    if process is not None and process.poll() is None:
        process.send_signal(signum)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def agent(directory: Path, network: Network) -> Iterator[Agent]:
    """Yield an agent that is not started yet; end it afterwards."""
    directory.mkdir()
    with Agent(directory, network) as made:
        yield made
