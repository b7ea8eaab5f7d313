"""The programs that a node of the test cluster runs besides corosync and pacemaker.

    node.py vmd DIRECTORY          a service manager: restarts the daemon at each end, with its stored descriptors
    node.py serve                  replaces sshd: runs commands, with the connection as input and output
    node.py shell HOST WORD ...    replaces ssh
    node.py ssh HOSTS OPTION ...   replaces ssh outside of all nodes; HOSTS is a file with their pids
    node.py fence DIRECTORY        a fence agent: asks the test to switch a node off, and waits until that is done
"""

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PORT = 22
PIECE = 1 << 16
FENCED_S = 60.0

METADATA = """<?xml version="1.0"?>
<resource-agent name="fence_test" shortdesc="Fencing by the test">
<longdesc>Asks the test.</longdesc>
<parameters>
<parameter name="action" unique="0" required="1"><content type="string" default="off"/></parameter>
<parameter name="port" unique="0" required="0"><content type="string"/></parameter>
</parameters>
<actions>
<action name="on" automatic="0"/><action name="off"/><action name="reboot"/><action name="status"/>
<action name="monitor"/><action name="metadata"/>
</actions>
</resource-agent>"""


def keep_vmd(own: Path) -> None:
    """Run the daemon like a service manager that keeps its descriptors."""
    from tests.support.keeper import Keeper

    command = [sys.executable, "-m", "vmd", "-d", "-f", str(own / "vm.conf")]
    with Keeper(Path("/run/notify")) as keeper:
        while True:
            environment = {**os.environ, "STATE_DIRECTORY": "/run/state"}
            keeper.spawn(command, log=own / "vmd.log", cwd=Path.cwd(), environment=environment).wait()
            time.sleep(0.2)


def serve() -> None:
    """Run commands of other nodes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("", PORT)) as server:
        while True:
            connection = server.accept()[0]
            with connection:
                line = b""
                while not line.endswith(b"\n") and (byte := connection.recv(1)):
                    line += byte
                subprocess.Popen(shlex.split(line.decode()), stdin=connection.fileno(), stdout=connection.fileno())


def shell(host: str, words: list[str]) -> int:
    """Run a command at another node, and pass its input and output on."""
    with socket.create_connection((host, PORT), 20) as there:
        there.settimeout(None)
        there.sendall(shlex.join(words).encode() + b"\n")
        poll = select.poll()
        for fd in (0, there.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _events in poll.poll():
                data = os.read(fd, PIECE)
                if fd and not data:
                    return 0
                if not data:
                    poll.unregister(0)
                    with contextlib.suppress(OSError):
                        there.shutdown(socket.SHUT_WR)
                elif fd:
                    os.write(1, data)
                else:
                    there.sendall(data)


def enter(hosts: Path, words: list[str]) -> None:
    """Execute a command at a node.  `words` are ssh's options, the host, and a line for a shell."""
    while words[0].startswith("-"):
        del words[: 2 if words[0] in ("-o", "-p", "-l", "-i", "-F") else 1]
    host, line = words[0], " ".join(words[1:])
    pid = json.loads(hosts.read_text())[host]
    os.execvp("nsenter", ["nsenter", "-t", str(pid), "-m", "-i", "-u", "-n", "-p", "sh", "-c", line])


def fence(place: Path) -> int:
    """Carry out the action that pacemaker asks for."""
    options = dict(line.strip().partition("=")[::2] for line in sys.stdin) if not sys.argv[3:] else {}
    action = options.get("action", "metadata")
    if action == "metadata":
        print(METADATA)
    elif action in ("off", "reboot"):
        asked = place / f"{options['port']}.{os.uname().nodename}.{os.getpid()}"
        asked.touch()
        deadline = time.monotonic() + FENCED_S
        while asked.exists():
            if time.monotonic() > deadline:
                return 1
            time.sleep(0.05)
    return 0


def main() -> int:
    """Run one of the programs."""
    match sys.argv[1:]:
        case ["vmd", own]:
            keep_vmd(Path(own))
        case ["serve"]:
            serve()
        case ["shell", host, *words]:
            return shell(host, words)
        case ["ssh", hosts, *words]:
            enter(Path(hosts), words)
        case ["fence", place, *_]:
            return fence(Path(place))
    return 2


if __name__ == "__main__":
    sys.exit(main())
