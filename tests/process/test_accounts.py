"""Status fields of a VM besides its state: its files, times, the reason of its end, its owner, its resource use."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.process.test_daemon import PROMPT
from tests.support import schema
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.migration import Plan
from tests.support.network import Network
from tests.support.transfers import from_file, to_file
from vmctl.table import COMMANDS
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm]

NOBODY = 65534
FILLED_MIB = 64
CONF = """
vm "demo" {{
    disable
    memory 256M
    boot "{kernel}"
    disk "{directory}/disk.raw" format raw
    cdrom "{directory}/disc.iso"
    interface {{ switch "lan" }}
    owner nobody
}}
vm "full" {{
    disable
    memory 128M
    boot "{fill}" cmdline "mib={filled_mib}"
    owner nobody
}}
switch "lan" {{ interface br9 }}
"""
WITHOUT_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")


@pytest.fixture(scope="module")
def vmd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Yield a daemon without the right to inspect other processes, with a VM that has every kind of device."""
    tmp_path = tmp_path_factory.mktemp("accounts")
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "disc.iso").write_bytes(bytes(4096))
    conf = CONF.format(kernel=guest("demo"), directory=tmp_path, fill=guest("fill"), filled_mib=FILLED_MIB)
    with Network() as network:
        daemon = NetDaemon(tmp_path, network, conf)
        daemon.prefix = [*WITHOUT_PTRACE]
        with daemon:
            yield daemon


def described(vmd: Daemon, *options: str, name: str = "demo") -> dict[str, Any]:
    """Return the row of a VM, after checking it with the schema."""
    (row,) = schema.check(vmd.must("status", "--json", *options, name), "status")["vms"]
    found: dict[str, Any] = row
    return found


def test_one_life(vmd: Daemon) -> None:
    """Status is correct before the start, while the VM runs, after a reset by its guest, and after its end."""
    before_s = int(time.time())
    row = described(vmd)
    assert (row["state"], row["started"], row["ended"], row["autostart"]) == ("stopped", None, None, False)
    assert row["boot_image"] == str(guest("demo"))
    assert row["disks"] == [{"path": str(vmd.directory / "disk.raw"), "format": "raw"}]
    assert row["cdrom"] == str(vmd.directory / "disc.iso")
    assert (row["interfaces"][0]["switch"], row["interfaces"][0]["tap"]) == ("lan", None)

    vmd.must("start", "demo")
    row = described(vmd, "-v")
    assert before_s <= row["started"] <= row["since"] <= time.time()
    assert row["restarts"] == 0
    (nic,) = row["interfaces"]
    assert nic["tap"].startswith("tap")
    assert nic["counters"] is not None
    assert described(vmd)["interfaces"] == [{**nic, "counters": None}]

    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)
        again = described(vmd)
        assert (again["started"], again["restarts"], again["ended"]) == (row["started"], 1, None)
        assert again["since"] >= row["since"]
        console.type("off\r")
        console.drain(DEADLINE_S)
    row = vmd.wait_state("demo", "stopped")
    assert row["ended"] == {"at": row["since"], "how": "powered off", "text": "powered off by the guest"}
    assert (row["started"], row["restarts"]) == (None, 1)

    vmd.must("start", "demo")
    assert described(vmd)["ended"] == row["ended"]
    (ended,) = schema.check(vmd.vmctl("stop", "-fw", "--json", "demo").stdout, "stop")["vms"]
    assert (ended["how"], ended["text"]) == ("killed", "stopped by force")
    assert described(vmd)["ended"]["how"] == "killed"


def test_a_received_vm(vmd: Daemon, tmp_path: Path) -> None:
    """The VM and its console belong to its owner, and the memory that came in its stream is counted.

    The VM's process has not touched that memory, so only the allocated blocks of the memory file show it.
    """
    vmd.must("start", "full")
    with vmd.console("full") as console:
        console.expect("filled", DEADLINE_S)
    to_file(vmd, "full", tmp_path / "stream")
    assert described(vmd, name="full")["ended"]["how"] == "sent"
    assert from_file(vmd, "full", tmp_path / "stream")[0] == 0
    pid = described(vmd, name="full")["pid"]
    before = private(pid)
    row = described(vmd, "-v", name="full")
    least = min(before, private(pid))  # the process may have become larger since the report
    assert row["figures"]["entropy"]["counted"] is True
    tty = os.stat(row["tty"])
    assert (row["owner"], row["uid"], tty.st_uid) == ("nobody", NOBODY, NOBODY)
    memory = guest_memory(pid)
    assert memory > FILLED_MIB << 20
    assert row["resident_bytes"] >= memory + least
    vmd.must("stop", "-fw", "full")
    assert described(vmd, name="full")["resident_bytes"] is None
    assert guest_memories(vmd.pid) == []  # memory of ended guests is not held


def test_every_command_prints_what_the_schema_says(vmd: Daemon, tmp_path: Path) -> None:
    """With a real daemon and on failure, standard output has exactly the document of the schema."""
    image = tmp_path / "new.qcow2"
    (tmp_path / "more.conf").write_text(
        f'vm "more" {{ disable\n disk "/nonexistent/disk" }}\nvm "one" {{ disable\n disk "{image}" }}\n'
    )
    (tmp_path / "disc.iso").write_bytes(bytes(4096))
    (tmp_path / "broken.conf").write_text("nonsense\n")
    asked: set[str] = set()

    def ask(
        *words: str | Path, name: str = "", status: int = 0, stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> dict[str, Any]:  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, *words, "--json"],
            cwd=vmd.code, timeout=DEADLINE_S, check=False, text=True,
            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert done.returncode == status, (words, done.stdout, done.stderr)
        asked.add(str(words[0]))
        return schema.check(done.stdout or done.stderr, name or ("error" if status else str(words[0])))

    assert ask("version")["vmd"] == VERSION
    assert len(ask("help")["commands"]) == len(COMMANDS)
    made = ask("create", "-s", "1500K", image)
    assert (made["format"], made["size_bytes"], made["notes"]) == ("qcow2", 1 << 20, ["disk size rounded to 1.0M"])
    assert ask("status")["vms"] == ask("show")["vms"]
    started = ask("start", "demo")
    assert ask("console", "demo")["tty"] == started["tty"]
    assert ask("pause", "demo")["paused"] is True
    assert ask("unpause", "demo")["paused"] is False
    with (tmp_path / "stream").open("wb") as stream:
        sent = ask("send", "demo", stdout=stream)
    assert sent["sent_bytes"] == (tmp_path / "stream").stat().st_size
    with (tmp_path / "stream").open("rb") as source:
        assert ask("receive", "-p", "demo", stdin=source)["paused"] is True
    assert ask("stop", "-fw", "demo")["vms"][0]["how"] == "killed"
    assert [row["name"] for row in ask("metrics")["vms"]] == ["demo", "full"]
    assert {row["name"] for row in ask("top", "0.1")["vms"]} <= {"demo", "full"}
    asked.add("events")  # prints one document after another (`test_events.py`)
    ask("log", "verbose")
    ask("log", "brief")
    assert ask("load", tmp_path / "more.conf")["notes"] == []
    assert ask("snapshot", "one", "first")["tag"] == "first"
    assert [row["tag"] for row in ask("snapshot", "-l", "one")["snapshots"]] == ["first"]
    assert ask("clone", "one@first", "two")["disks"] == [{"path": str(tmp_path / "two-disk0"), "format": "qcow2"}]
    assert ask("resize", "one", "disk0", "3M")["size_bytes"] == 3 << 20
    assert ask("cdrom", "one", tmp_path / "disc.iso")["cdrom"] == str(tmp_path / "disc.iso")
    assert ask("cdrom", "-e", "one")["cdrom"] is None
    ask("start", "full")
    assert ask("migrate", "-e", Plan(tmp_path / "plan", vmd).command, "full", "here:moved")["host"] == "here"
    assert ask("stop", "-fw", "moved")["vms"][0]["how"] == "killed"
    ask("reload")
    ask("reset", "switches")
    assert ask("upgrade")["vmd"] == VERSION
    (ended,) = ask("wait", "nobody", status=4, name="wait")["vms"]  # reports the failure for each VM
    assert (ended["result"], ended["code"]) == ("failed", errno.ENOENT)
    assert "broken.conf:1: " in ask("load", tmp_path / "broken.conf", status=1)["error"]
    with (tmp_path / "stream").open("wb") as stream:
        assert "not found" in ask("send", "nobody", status=4, stdout=stream)["error"]
    assert "not found" in ask("ssh", "nobody", status=4)["error"]  # an existing VM: `test_ssh.py`
    assert {each.name for each in COMMANDS} <= asked


def guest_memories(pid: int) -> list[int]:
    """Return the allocated size of each guest memory that a process has open."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if "guest-memory" in os.readlink(fd):
            status = fd.stat()
            found[status.st_ino] = status.st_blocks * 512
    return list(found.values())


def guest_memory(pid: int) -> int:
    """Return the allocated size of the guest's memory, from its VM's process."""
    (found,) = guest_memories(pid)
    return found


def private(pid: int) -> int:
    """Return the private memory of a process."""
    rollup = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", rollup)
    assert found is not None
    return int(found[1]) << 10
