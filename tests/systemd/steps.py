"""The steps that run on the emulated host, with its own Python.  Each step is a function, which returns its result.

A unit starts this program at each boot, and it runs the steps of that boot.  Each step adds a line of JSON to
/host/results: {"step", "took_s", "seen"} or, if it raised an exception, {"step", "took_s", "error"}.  Steps after a
failed one still run.

A program takes a second to start there, and a Python program several.  So the steps never poll with programs.  They
wait for the daemon's lines in the journal, and read the rest from /proc and /sys.
"""

import contextlib
import json
import os
import queue
import select
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = Path("/host")
CONF = Path("/etc/vm.conf")
LINKS = Path("/sys/class/net")
DEADLINE_S = 300.0  # the machine is about thirty times slower than this host
BOOT_COUNT = Path("/var/lib/boots")
PROMPT = b"vmd-demo> "
WHERE = b"\x1b[6n"  # after its prompt, a shell asks the terminal for the position of the cursor with this
BYTES = 20_000  # sent through a guest, and back
SECOND = 'vm "second" {\n    memory 32M\n    boot "/srv/demo.elf"\n}\n'
LIMITED = SECOND.replace("}", "    limit { memory 256M, cpu 5%, weight 50 }\n}")
MISTAKE = "vm lots {\n"


def run(*command: str) -> tuple[int, str]:
    """Run a program.  Return its exit status and its output."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def must(*command: str) -> str:
    """Run a program that must succeed.  Return its output."""
    status, said = run(*command)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}: {said}")
    return said


class Journal:
    """The journal of the unit since the boot, followed as it grows: lines of the daemon and of systemd."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        command = ("journalctl", "-b", "-u", "vmd", "-o", "json", "--follow", "--no-tail")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as follower:
            assert follower.stdout is not None
            for line in follower.stdout:
                self._lines.put(line)

    def wait(self, *texts: str) -> list[dict[str, Any]]:
        """Wait until there is an entry with each of the texts.  Return the entries since the last wait."""
        news: list[dict[str, Any]] = []
        missing = set(texts)
        deadline = time.monotonic() + DEADLINE_S
        while missing:
            try:
                news.append(json.loads(self._lines.get(timeout=max(0.0, deadline - time.monotonic()))))
            except queue.Empty:
                raise RuntimeError(f"not in the journal after {DEADLINE_S} s: {missing}\n{said(news)}") from None
            missing = {text for text in missing if text not in news[-1]["MESSAGE"]}
        self.entries += news
        return news


def said(entries: list[dict[str, Any]]) -> list[str]:
    """Return the texts of entries."""
    return [entry["MESSAGE"] for entry in entries]


def unit(*names: str) -> dict[str, str]:
    """Return properties of the unit."""
    shown = must("systemctl", "show", "vmd", *(f"--property={name}" for name in names))
    return dict(line.split("=", 1) for line in shown.splitlines())


def rows() -> dict[str, Any]:
    """Return the row of each VM in `vmctl status`."""
    return {row["name"]: row for row in json.loads(must("vmctl", "status", "-v", "--json"))["vms"]}


def links() -> dict[str, str]:
    """Return the network interfaces, each with the name of its bridge, or ""."""
    return {
        link.name: (link / "master").resolve().name if (link / "master").exists() else "" for link in LINKS.iterdir()
    }


def processes() -> dict[int, str]:
    """Return the titles of all processes of ours, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            title = path.read_text()
            if title.startswith("vmd: "):
                found[int(path.parent.name)] = title.rstrip("\0")
    return found


def ask(entries: list[dict[str, Any]], name: str, command: str) -> str:
    """Type a command at the console of a VM, whose terminal is in a journal entry.  Return the guest's answer."""
    line = next(text for text in said(entries) if f"started {name} (" in text)
    return type_at(line.rpartition(" ")[2], command, PROMPT)


def type_at(tty: str, command: str, wanted: bytes) -> str:
    """Type a command at a terminal.  Return the guest's answer up to the wanted text."""
    fd = os.open(tty, os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, command.encode() + b"\r")
        end = (wanted, wanted + WHERE)
        return read_until(fd, lambda answer: answer.partition(command.encode())[2].endswith(end))
    finally:
        os.close(fd)


def wait_at(tty: str, wanted: bytes) -> str:
    """Wait until a guest writes a text to its terminal, which has no other reader.  Return the output up to then."""
    fd = os.open(tty, os.O_RDWR | os.O_NOCTTY)
    try:
        return read_until(fd, lambda answer: wanted in answer)
    finally:
        os.close(fd)


def read_until(fd: int, done: Callable[[bytes], bool]) -> str:
    """Return the output of a terminal until `done` accepts it."""
    console = select.poll()
    console.register(fd, select.POLLIN)
    answer = b""
    while not done(answer):
        if not console.poll(DEADLINE_S * 1000):
            raise RuntimeError(f"a guest writes no more: {answer!r}")
        answer += os.read(fd, 4096)
    return answer.decode(errors="replace")


def connect(address: str, port: int) -> socket.socket:
    """Connect to a server that is about to listen."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return socket.create_connection((address, port), DEADLINE_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def echo(connection: socket.socket, count: int) -> bool:
    """Send bytes to the guest, which sends them back.  Return whether they are the same."""
    sent = bytes(number % 251 for number in range(count))
    connection.sendall(sent)
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise RuntimeError(f"the connection has ended after {len(received)} bytes")
        received += piece
    return received == sent


journal: Journal  # of this boot
connection: socket.socket  # to the guest that serves TCP


# --- first boot ----------------------------------------------------------------------------------------------------


def enable() -> dict[str, Any]:
    """Enable and start the unit, as the README says."""
    must("systemctl", "enable", "--now", "vmd")
    entries = journal.wait("started full (")
    answer = ask(entries, "full", "pci")
    return {"rows": rows(), "devices": os.listdir("/dev"), "links": links(), "answer": answer}


def control_group() -> dict[str, Any]:
    """Read the counters of the unit's control group."""
    return unit("MemoryCurrent", "TasksCurrent", "ControlGroup")


def rights() -> dict[str, Any]:
    """Read the rights and the control group of each process."""
    found = {}
    for pid, title in processes().items():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        group = Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("0::")[2]
        found[title.removeprefix("vmd: ")] = {
            "uids": status["Uid"], "filter": status["Seccomp"][0], "capabilities": status["CapPrm"][0],
            "score": int(Path(f"/proc/{pid}/oom_score_adj").read_text()), "group": group,
            "tasks_max": Path(f"/sys/fs/cgroup{group}/pids.max").read_text().strip(),
        }  # fmt: skip
    main = int(unit("MainPID")["MainPID"])
    parent = [line.split() for line in Path(f"/proc/{main}/status").read_text().splitlines()]
    bounds = {words[0]: words[1] for words in parent if words[0] in ("CapPrm:", "CapBnd:")}
    return {
        "processes": found, "parent": bounds, "score": int(Path(f"/proc/{main}/oom_score_adj").read_text())
    }  # fmt: skip


def journal_fields() -> dict[str, Any]:
    """Return the daemon's entries in the journal, without those of systemd."""
    return {"entries": [entry for entry in journal.entries if entry["_PID"] != "1"]}


def reload() -> dict[str, Any]:
    """Reload a file with a mistake, and then one with another VM."""
    before = processes()
    right = CONF.read_text()
    CONF.write_text(right + MISTAKE)
    refused, _ = run("systemctl", "reload", "vmd")
    complaint = said(journal.wait("vmctl: 1 error, configuration unchanged", "vmd: 1 error, configuration unchanged"))
    CONF.write_text(right + SECOND)
    must("systemctl", "reload", "vmd")
    answer = ask(journal.wait("started second ("), "second", "mem")
    CONF.write_text(right)
    return {"refused": refused, "complaint": complaint, "before": before, "after": processes(), "answer": answer}


def group_of(title: str) -> Path:
    """Return the control group of a process of ours."""
    pid = next(pid for pid, found in processes().items() if found == title)
    return Path("/sys/fs/cgroup" + Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("0::")[2])


def limits() -> dict[str, Any]:
    """Limit a VM while it runs, and then remove the limits."""
    right, group, tty = CONF.read_text(), group_of("vmd: vm/second"), rows()["second"]["tty"]
    found: list[dict[str, str]] = []
    for block in (LIMITED, SECOND):
        CONF.write_text(right + block)
        text = must("vmctl", "reload")
        answer = type_at(tty, "mem", PROMPT)
        files = ("cpu.max", "cpu.weight", "memory.max", "memory.oom.group", "cpu.stat")
        found.append({"said": text, "answer": answer, **{name: (group / name).read_text().strip() for name in files}})
    CONF.write_text(right)
    return {"found": found}


def out_of_memory() -> dict[str, Any]:
    """Let the kernel kill a VM for its use of memory."""
    before, group = processes(), group_of("vmd: vm/second")
    (group.parent / "cgroup.subtree_control").write_text("+memory")
    (group / "memory.oom.group").write_text("1")
    (group / "memory.max").write_text("8M")
    run("sh", "-c", f"echo 0 >{group}/cgroup.procs && exec dd if=/dev/zero of=/dev/null bs=64M count=1")
    entries = journal.wait("second: terminated")
    _, answer = run("systemctl", "show", group.parent.name, "--property=ActiveState,Result,MemoryAccounting")
    return {"before": before, "after": processes(), "said": said(entries), "scope": answer.splitlines()}


def linux() -> dict[str, Any]:
    """Start a stock Linux, and let it serve TCP on its local interface."""
    global connection
    must("vmctl", "start", "linux")
    tty = rows()["linux"]["tty"]
    greeting = wait_at(tty, b"# ")
    type_at(tty, "nc -ll -p 7 -e cat &", b"# ")
    address = greeting.partition("dhcp: eth0 ")[2].partition("/")[0]
    connection = connect(address, 7)
    return {"greeting": greeting, "same": echo(connection, BYTES)}


def broken() -> dict[str, Any]:
    """Install a version that cannot take over."""
    return install("/host/broken.deb")


def upgrade() -> dict[str, Any]:
    """Install a newer version while guests run, and let one of them reboot."""
    seen = install("/host/newer.deb")
    connection.close()
    tty = rows()["linux"]["tty"]
    type_at(tty, "reboot -f", b"\n")
    seen["greeting"] = wait_at(tty, b"# ")
    seen["reset"] = must("vmctl", "version")
    must("vmctl", "stop", "-fw", "linux")
    return seen


def install(package: str) -> dict[str, Any]:
    """Install a package while guests run.  One of them has a TCP connection."""
    unit_before, before, before_rows, links_before = unit("MainPID"), processes(), rows(), links()
    text = must("apt-get", "-q", "-y", "install", package)
    same = echo(connection, BYTES)
    return {
        "said": text, "before": before, "after": processes(), "unit_before": unit_before, "unit": unit("MainPID"),
        "version": must("vmctl", "version"), "same": same, "rows_before": before_rows, "rows": rows(),
        "links_before": links_before, "links": links(),
    }  # fmt: skip


def kill() -> dict[str, Any]:
    """Kill the daemon without a warning, and wait for the next one, which systemd starts."""
    unit_before, before, links_before = unit("MainPID"), processes(), links()
    tty = rows()["full"]["tty"]
    must("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "vmd")
    entries = journal.wait("vmd: startup")
    answer = type_at(tty, "pci", PROMPT)
    return {
        "said": said(entries), "before": before, "after": processes(), "links_before": links_before, "links": links(),
        "answer": answer, "unit_before": unit_before, "unit": unit("MainPID", "ActiveState", "NRestarts"),
        "version": must("vmctl", "version"),
    }  # fmt: skip


# --- second boot ---------------------------------------------------------------------------------------------------


def previous() -> dict[str, Any]:
    """Return the daemon's journal of the last boot, in which the host was powered off."""
    return {"said": must("journalctl", "-b", "-1", "-u", "vmd", "-o", "cat", "-n", "40").splitlines()}


def again() -> dict[str, Any]:
    """Wait until the enabled unit runs, without a command."""
    entries = journal.wait("started full (")
    answer = ask(entries, "full", "pci")
    return {"said": said(entries), "answer": answer, "unit": unit("ActiveState", "NRestarts")}


def stop() -> dict[str, Any]:
    """Stop the unit while a guest runs."""
    before = processes()
    must("systemctl", "stop", "vmd")
    return {
        "before": before, "after": processes(), "links": links(), "tables": must("nft", "list", "tables"),
        "said": said(journal.wait("vmd: terminating")), "unit": unit("ActiveState", "Result", "ExecMainStatus"),
    }  # fmt: skip


def mistake() -> dict[str, Any]:
    """Start the unit with a mistake in vm.conf."""
    with CONF.open("a") as conf:
        conf.write(MISTAKE)
    status, text = run("systemctl", "start", "vmd")
    entries = journal.wait("/etc/vm.conf:")
    _, shown = run("systemctl", "status", "--no-pager", "--full", "vmd")
    return {
        "status": status, "said": text, "shown": shown, "entries": entries,
        "unit": unit("ActiveState", "ExecMainStatus", "NRestarts"), "processes": processes(),
    }  # fmt: skip


BOOTS: tuple[tuple[Callable[[], dict[str, Any]], ...], ...] = (
    (
        enable, control_group, rights, journal_fields, reload, limits, linux, broken, upgrade, out_of_memory, kill,
    ),
    (previous, again, stop, mistake),
)


def main() -> None:
    """Run the steps of this boot, and power the host off.  In the first boot a guest still runs then."""
    global journal
    journal = Journal()
    number = int(BOOT_COUNT.read_text()) if BOOT_COUNT.exists() else 0
    BOOT_COUNT.write_text(str(number + 1))
    for step in BOOTS[number]:
        began = time.monotonic()
        result: dict[str, Any]
        try:
            result = {"seen": step()}
        except Exception:
            result = {"error": traceback.format_exc()}
        result |= {"step": step.__name__, "took_s": round(time.monotonic() - began, 1)}
        with open(HOST / "results", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    must("systemctl", "poweroff")


if __name__ == "__main__":
    main()
