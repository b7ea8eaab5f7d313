"""Descriptors that outlive the daemon are stored in the service manager, and come back by name."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.keeper import Keeper
from vmd.parent import service, store
from vmd.parent.startup import EX_CONFIG, EX_UNAVAILABLE
from vmd.parent.store import STORE_MAX, Store, inherited

# Prints which descriptors and variables it has, stores a descriptor, and ends.
PROGRAM = """
import json, os, sys
from vmd.parent.store import Store, inherited
found = inherited()
left = [name for name in os.environ if name.startswith(("LISTEN_", "VMD_"))]
print(json.dumps({
    "found": {name: os.read(fd, 100).decode() for name, fd in found.items()},
    "inheritable": [name for name, fd in found.items() if os.get_inheritable(fd)], "left": left,
}), flush=True)
store = Store(found)
reader, writer = os.pipe()
os.write(writer, b"from " + sys.argv[1].encode())
os.close(writer)
store.put(sys.argv[1], reader, poll=False)
"""

# Executes PROGRAM in its place, after a program that does not exist.
PLACE = """
import os, sys
from vmd.parent.store import Store
store = Store()
reader, writer = os.pipe()
os.write(writer, b"from before")
os.close(writer)
store.put("vmm-1", reader)
os.close(reader)
try:
    store.execute(["/nonexistent"])
except FileNotFoundError:
    assert not os.get_inheritable(store.duplicate("vmm-1"))
store.execute([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """Yield a service manager that serves this process."""
    with Keeper(tmp_path / "notify") as keeper:
        monkeypatch.setenv("NOTIFY_SOCKET", str(keeper.path))
        yield keeper


def run(keeper: Keeper, directory: Path, name: str) -> dict[str, object]:
    """Run PROGRAM, which stores a descriptor with this name.  Return its output."""
    log = directory / f"log-{name}"
    process = keeper.spawn([sys.executable, "-c", PROGRAM, name], log=log, cwd=ROOT, environment=os.environ)
    assert process.wait(DEADLINE_S) == 0, log.read_text()
    said: dict[str, object] = json.loads(log.read_text())
    return said


def test_the_next_process_has_the_stored_descriptors(keeper: Keeper, tmp_path: Path) -> None:
    """They have their names.  Programs that it starts inherit neither them nor the variables."""
    first = run(keeper, tmp_path, "state")
    keeper.wait_names("state")
    second = run(keeper, tmp_path, "vmm-1")
    keeper.wait_names("state", "vmm-1")

    assert first == {"found": {}, "inheritable": [], "left": []}
    assert second == {"found": {"state": "from state"}, "inheritable": [], "left": []}


def test_a_program_executed_in_place_has_the_stored_descriptors() -> None:
    """This works with and without a service manager.  If the program cannot be executed, nothing changes."""
    with subprocess.Popen(
        [sys.executable, "-c", PLACE, PROGRAM, "state"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.read())

    assert process.wait(DEADLINE_S) == 0
    assert said == {"found": {"vmm-1": "from before"}, "inheritable": [], "left": []}


def test_a_channel_that_is_closed_is_removed_from_the_store(keeper: Keeper) -> None:
    """The service manager removes it when its process has ended, unless it was stored without polling."""
    store = Store()
    channels = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    store.put("vmm-1", channels[0][0].fileno())
    store.put("log-1", channels[1][0].fileno(), poll=False)
    keeper.wait_names("log-1", "vmm-1")

    for _, theirs in channels:
        theirs.close()
    keeper.wait_names("log-1")

    for ours, _ in channels:
        ours.close()


def test_the_other_end_sees_the_end_when_a_channel_is_removed(keeper: Keeper) -> None:
    """It does not see the end when the daemon closes its own descriptor, because the store has a duplicate."""
    store = Store()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(DEADLINE_S)
    with theirs, ours as channel:
        store.put("vmm-1", channel.fileno())
        keeper.wait_names("vmm-1")
        channel.close()
        with socket.socket(fileno=store.duplicate("vmm-1")) as again:
            again.send(b"still here")
        assert theirs.recv(100) == b"still here"

        store.remove("vmm-1")
        store.remove("vmm-1")  # it was removed already: nothing happens

        assert theirs.recv(100) == b""
        keeper.wait_names()


def test_a_name_is_stored_once(keeper: Keeper) -> None:
    """A new descriptor with the same name replaces the earlier one."""
    store = Store()
    for text in (b"first", b"second"):
        reader, writer = os.pipe()
        os.write(writer, text)
        os.close(writer)
        store.put("state", reader, poll=False)
        os.close(reader)
    store.put("listener", 0, poll=False)
    keeper.wait_names("listener", "state")

    assert os.read(keeper.fd("state"), 100) == b"second"
    assert store.names == ("state", "listener")
    assert store.room == STORE_MAX - 2


def test_descriptors_for_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables name another process, or are invalid.  No descriptor is touched."""
    before = [os.get_inheritable(fd) for fd in (0, 1, 2)]
    for pid, count in ((os.getppid(), "2"), (os.getpid(), "two"), (os.getpid(), "-1"), (os.getpid(), "²"), ("", "")):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", count)
        monkeypatch.setenv("LISTEN_FDNAMES", "state:listener")

        assert inherited() == {}
        assert "LISTEN_FDS" not in os.environ
    assert [os.get_inheritable(fd) for fd in (0, 1, 2)] == before


def test_descriptors_that_were_stored_wrongly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first of a name is used, and the others are closed.  One that is not there is named in the log."""
    first, second = os.pipe()
    os.set_inheritable(first, True)
    with monkeypatch.context() as patch:
        patch.setenv("VMD_STORED", f"state={first} state={second} vmm-1=9999 log-1=x junk")
        assert inherited() == {"state": first}
    assert not os.get_inheritable(first)
    said = capfd.readouterr().err
    assert "two descriptors were stored as state: the first one is used" in said
    assert "descriptor 9999 (vmm-1), which was stored, is not there: Bad file descriptor" in said
    assert said.count("\n") == 2
    os.close(first)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)


@pytest.mark.parametrize(
    ("count", "names", "found"),
    [
        ("2", "state:vmm-1", ["state", "vmm-1"]),
        ("2", "state", ["state", ""]),
        ("1", "state:vmm-1", ["state"]),
        ("0", "", []),
        ("99999999999", "state:vmm-1", ["state", "vmm-1"]),
    ],
)
def test_descriptors_of_the_service_manager(
    monkeypatch: pytest.MonkeyPatch, count: str, names: str, found: list[str]
) -> None:
    """They follow one another.  There are no more than the store can have."""
    reading, writing = os.pipe()
    first = fcntl.fcntl(reading, fcntl.F_DUPFD, 900)
    os.dup2(writing, first + 1)
    monkeypatch.setattr(store, "FIRST_FD", first)
    monkeypatch.setattr(store, "STORE_MAX", 2)
    for name, value in (("LISTEN_PID", str(os.getpid())), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)):
        monkeypatch.setenv(name, value)

    assert inherited() == {name: first + number for number, name in enumerate(found)}
    for fd in (reading, writing, first, first + 1):
        os.close(fd)


def test_a_store_without_a_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store still knows the names that it was given."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    store = Store()

    store.put("state", 0, poll=False)

    assert list(store.names) == ["state"]
    store.remove("state")
    assert list(store.names) == []


def test_service_manager_that_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The store waits only for NOTIFY_S, and the log names what is not stored."""
    monkeypatch.setattr(service, "NOTIFY_S", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        filled = 0
        while service.notify("STATUS=full"):
            filled += 1
        Store().put("state", 0, poll=False)

    assert filled > 0
    assert "the service manager does not store state" in capfd.readouterr().err


def test_unit_stores_as_much_as_the_daemon_counts_on() -> None:
    """Only those exit statuses prevent a restart that a daemon with guests never has."""
    unit = Path(ROOT, "etc/vmd.service").read_text().splitlines()

    assert f"FileDescriptorStoreMax={STORE_MAX}" in unit
    assert f"RestartPreventExitStatus={EX_UNAVAILABLE} {EX_CONFIG}" in unit
