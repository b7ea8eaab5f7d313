"""Permissions (*cat. 4.8*): one test for each cell of the matrix, with real users and the demonstration guest."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.network import Network
from tests.support.users import Users, UsersDaemon

pytestmark = [pytest.mark.root, pytest.mark.kvm]

ROOT, OWNER, MEMBER, PRIMARY, STARTER = "root", "olga", "mila", "petra", "stan"
INSTANCE_OWNER, USER, OUTSIDER = "ines", "ulf", "otto"
PEOPLE = (ROOT, OWNER, MEMBER, PRIMARY, STARTER, INSTANCE_OWNER, USER, OUTSIDER)
TEAM, MAY_CONNECT = "vmteam", "vmusers"

CONF = """
socket owner :{connect}

vm "demo" {{
    disable
    memory 32M
    boot "{kernel}"
    owner {owner}:{team}
}}

vm "template" {{
    disable
    memory 32M
    boot "{kernel}"
    allow instance {{ memory, owner {instance_owner} }}
}}
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Give a directory that every user may enter, with a kernel that every user may read."""
    with tempfile.TemporaryDirectory(prefix="vmd-permissions-") as path:
        Path(path).chmod(0o755)
        kernel = Path(path) / "kernel"
        kernel.write_bytes(guest("demo").read_bytes())
        kernel.chmod(0o644)
        yield Path(path)


@pytest.fixture(scope="module")
def host(place: Path) -> Iterator[Users]:
    """Give a host with all users of PEOPLE."""
    with Users(place) as users:
        for group in (TEAM, MAY_CONNECT):
            users.add_group(group)
        for name in (OWNER, INSTANCE_OWNER, USER):
            users.add_user(name, MAY_CONNECT)
        for name in (MEMBER, STARTER):
            users.add_user(name, MAY_CONNECT, TEAM)
        users.add_user(PRIMARY, MAY_CONNECT, primary=TEAM)
        users.add_user(OUTSIDER)
        yield users


@pytest.fixture(scope="module")
def daemon(place: Path, host: Users) -> Iterator[UsersDaemon]:
    """Give a daemon with a VM of OWNER's and a template, both stopped."""
    conf = CONF.format(
        connect=MAY_CONNECT, kernel=place / "kernel", owner=OWNER, team=TEAM, instance_owner=INSTANCE_OWNER
    )
    with Network() as network, UsersDaemon(place, host, network, conf) as daemon:
        yield daemon


def restore(vmd: UsersDaemon) -> None:
    """Stop all VMs and forget those that vm.conf does not describe."""
    vmd.must("stop", "-afw")
    vmd.must("reload")
    assert [row["name"] for row in vmd.rows()] == ["demo", "template"]


@pytest.fixture
def vmd(daemon: UsersDaemon) -> UsersDaemon:
    """Give the daemon with only its two VMs, both stopped."""
    if [(row["name"], row["state"]) for row in daemon.rows()] != [("demo", "stopped"), ("template", "stopped")]:
        restore(daemon)
    return daemon


@pytest.fixture
def running(daemon: UsersDaemon, host: Users) -> Iterator[UsersDaemon]:
    """Give the daemon with `demo` running.  STARTER has started it, and is no member of the group any more.

    Most requests are refused, so the VM need not be started again for the next test.
    """
    if [(row["name"], row["state"], row["owner"]) for row in daemon.rows()][:1] != [
        ("demo", "running", f"{STARTER}:{TEAM}")
    ]:
        restore(daemon)
        daemon.must_as(STARTER, "start", "demo")
    host.run("gpasswd", "--delete", STARTER, TEAM)
    yield daemon
    host.run("gpasswd", "--add", STARTER, TEAM)


def refused(done: subprocess.CompletedProcess[str], person: str, words: str) -> None:
    """Check that vmctl failed, with one line that has these words."""
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    if person == OUTSIDER:
        words = "Permission denied"
    assert words in done.stderr


def cells(*allowed: str) -> Callable[..., Callable[..., None]]:
    """Parametrize the test of a row of the matrix: one cell for each person, and whether the request is allowed."""
    parameters = [pytest.param(person, person in allowed, id=person) for person in PEOPLE]
    return pytest.mark.parametrize(("person", "allowed"), parameters)


# --- all users who can open the socket -------------------------------------------------------------------


@cells(*PEOPLE[:-1])
def test_status(running: UsersDaemon, person: str, allowed: bool) -> None:
    """`status -v` shows all VMs to users who can open the socket: root and the members of its group."""
    done = running.vmctl_as(person, "status", "-v")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert "running demo" in done.stdout
        assert "stopped template" in done.stdout
    else:
        refused(done, person, "")


# --- root, the owner, the group --------------------------------------------------------------------------


@cells(ROOT, OWNER, MEMBER, PRIMARY, STARTER)
def test_start_a_vm_that_exists(vmd: UsersDaemon, person: str, allowed: bool) -> None:
    """The user who started the VM is its owner while it runs."""
    done = vmd.vmctl_as(person, "start", "demo")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert vmd.status("demo")["owner"] == f"{person}:{TEAM}"
    else:
        refused(done, person, "may not start vm demo")
        assert vmd.status("demo")["state"] == "stopped"


@cells(ROOT, OWNER, MEMBER, PRIMARY, STARTER)
def test_boot_another_kernel_once(vmd: UsersDaemon, place: Path, person: str, allowed: bool) -> None:
    """`start -b` of a VM that exists needs the same right as `start`."""
    done = vmd.vmctl_as(person, "start", "-b", place / "kernel", "demo")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert vmd.status("demo")["state"] == "running"
    else:
        refused(done, person, "may not start vm demo")
        assert vmd.status("demo")["state"] == "stopped"


# --- root only, or the owner that a template names -------------------------------------------------------


@cells(ROOT)
def test_start_a_vm_that_vm_conf_does_not_describe(vmd: UsersDaemon, place: Path, person: str, allowed: bool) -> None:
    """Only root may start a VM with a configuration of their own."""
    done = vmd.vmctl_as(person, "start", "-m", "32M", "-b", place / "kernel", "adhoc")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert vmd.status("adhoc")["state"] == "running"
    else:
        refused_in_last_line(done, person, "only root may start a VM that vm.conf does not describe")
        assert len(vmd.rows()) == 2


def refused_in_last_line(done: subprocess.CompletedProcess[str], person: str, words: str) -> None:
    """Check that vmctl failed, and that the last line has these words.  Warnings may precede it."""
    assert done.returncode == 1
    assert ("Permission denied" if person == OUTSIDER else words) in done.stderr.strip().splitlines()[-1]


@cells(ROOT, INSTANCE_OWNER)
def test_start_an_instance(vmd: UsersDaemon, person: str, allowed: bool) -> None:
    """The template allows its owner an instance with another size of memory."""
    done = vmd.vmctl_as(person, "start", "-t", "template", "-m", "48M", "instance")
    if allowed:
        assert done.returncode == 0, done.stderr
        row = vmd.status("instance")
        assert (row["owner"], row["memory_bytes"]) == (person, 48 << 20)
    else:
        refused(done, person, "has no permission to create instances of vm template")
        assert len(vmd.rows()) == 2


@cells(ROOT)
def test_start_an_instance_beyond_what_is_allowed(vmd: UsersDaemon, person: str, allowed: bool) -> None:
    """The message names the setting that the instance owner may not change."""
    done = vmd.vmctl_as(person, "start", "-t", "template", "-p", "2", "instance")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert vmd.status("instance")["vcpus"] == 2
    else:
        words = "no permission to set cpus" if person == INSTANCE_OWNER else "no permission to create instances"
        refused(done, person, words)
        assert len(vmd.rows()) == 2


# --- a running VM: root, the user who started it, its group ----------------------------------------------


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_stop(running: UsersDaemon, person: str, allowed: bool) -> None:
    """While the VM runs, the user who started it may stop it, and the owner in vm.conf may not."""
    done = running.vmctl_as(person, "stop", "-fw", "demo")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert running.status("demo")["state"] == "stopped"
    else:
        refused_in_last_line(done, person, "may not stop vm demo")
        assert running.status("demo")["state"] == "running"


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_wait(running: UsersDaemon, person: str, allowed: bool) -> None:
    """The users who may stop a VM may wait for its end."""
    with subprocess.Popen(
        running.command_of(person, "wait", "demo"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as waiter:
        assert waiter.stderr is not None
        if allowed:
            assert waiter.stderr.read(len("waiting")) == "waiting"
            running.must("status")
            running.must("stop", "-fw", "demo")
        said = waiter.stderr.read()
        assert waiter.wait(DEADLINE_S) == (0 if allowed else 1), said
    if not allowed:
        assert ("Permission denied" if person == OUTSIDER else "may not wait for vm demo") in said


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_pause(running: UsersDaemon, person: str, allowed: bool) -> None:
    """The users who may stop a VM may pause it."""
    done = running.vmctl_as(person, "pause", "demo")
    if allowed:
        assert done.returncode == 0, done.stderr
    else:
        refused_in_last_line(done, person, "may not pause vm demo")
    assert running.status("demo")["state"] == ("paused" if allowed else "running")


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_unpause(running: UsersDaemon, person: str, allowed: bool) -> None:
    """The users who may stop a VM may resume it."""
    running.must("pause", "demo")
    done = running.vmctl_as(person, "unpause", "demo")
    if allowed:
        assert done.returncode == 0, done.stderr
    else:
        refused_in_last_line(done, person, "may not unpause vm demo")
    assert running.status("demo")["state"] == ("running" if allowed else "paused")


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_watch_or_take_over_a_console(running: UsersDaemon, person: str, allowed: bool) -> None:
    """Users who may use a console may also watch it, take it over, and read it after its VM has ended."""
    for arguments, refusal in ((("console", "-f", "demo"), "attach to"), (("console", "-r", "demo"), "watch")):
        if allowed and "-r" in arguments:
            running.must("stop", "-fw", "demo")  # so that watching ends
        done = running.vmctl_as(person, *arguments)
        if allowed:
            assert done.returncode == 0, done.stderr
        else:
            refused_in_last_line(done, person, f"may not {refusal} vm demo")
    running.vmctl("stop", "-fw", "demo")
    done = running.vmctl_as(person, "console", "demo")
    assert done.returncode == (0 if allowed else 1)
    assert ("vmd demo guest" in done.stdout) is allowed


@cells(ROOT, MEMBER, PRIMARY, STARTER)
def test_console(running: UsersDaemon, person: str, allowed: bool) -> None:
    """The daemon refuses the same users as the mode of the pty."""
    with subprocess.Popen(
        running.command_of(person, "console", "demo"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as viewer:  # fmt: skip
        assert viewer.stdin is not None
        assert viewer.stdout is not None
        assert viewer.stderr is not None
        seen = b""
        if allowed:
            viewer.stdin.write(b"\recho the viewer was here\r")
            viewer.stdin.flush()
            while b"the viewer was here\r\n" not in seen:
                piece = os.read(viewer.stdout.fileno(), 4096)
                assert piece, (seen, viewer.stderr.read())
                seen += piece
        viewer.stdin.close()
        said = viewer.stderr.read().decode()
        assert viewer.wait(DEADLINE_S) == (0 if allowed else 1), said
    if not allowed:
        assert ("Permission denied" if person == OUTSIDER else "may not attach to vm demo") in said


@pytest.mark.parametrize("verb", ["stop", "pause", "wait"])
def test_an_owner_who_starts_the_vm_may_stop_it(vmd: UsersDaemon, verb: str) -> None:
    """A VM that its owner has started belongs to the owner.  A user outside the group may not touch it."""
    vmd.must_as(OWNER, "start", "demo")
    done = vmd.vmctl_as(USER, verb, "demo")
    assert done.returncode == 1
    assert f"may not {'wait for' if verb == 'wait' else verb} vm demo" in done.stderr
    vmd.must_as(OWNER, "pause", "demo")
    vmd.must_as(OWNER, "unpause", "demo")
    vmd.must_as(OWNER, "stop", "-fw", "demo")


# --- root only -------------------------------------------------------------------------------------------


@cells(ROOT)
@pytest.mark.parametrize(
    "command", [("load", "vm.conf"), ("reload",), ("reset", "switches"), ("reset", "vms"), ("log", "brief")],
    ids=["load", "reload", "reset switches", "reset vms", "log"],
)  # fmt: skip
def test_manage_the_daemon(
    vmd: UsersDaemon, place: Path, command: tuple[str, ...], person: str, allowed: bool
) -> None:
    """Only root may change the configuration and the log."""
    words = [str(place / word) if word.endswith(".conf") else word for word in command]
    done = vmd.vmctl_as(person, *words)
    if allowed:
        assert done.returncode == 0, done.stderr
    else:
        refused(done, person, "only root may do that")
        assert len(vmd.rows()) == 2


@cells(ROOT)
def test_send_and_receive(running: UsersDaemon, place: Path, person: str, allowed: bool) -> None:
    """Only root may send a VM, whose memory is in the stream, or receive one, because a stream may be forged."""
    stream = place / "stream"
    with stream.open("wb") as out:
        sent = subprocess.run(
            running.command_of(person, "send", "demo"),
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    with stream.open("rb") as back:
        received = subprocess.run(
            running.command_of(person, "receive", "demo"),
            stdin=back, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    if allowed:
        assert (sent.returncode, received.returncode) == (0, 0), sent.stderr + received.stderr
    else:
        refused_in_last_line(sent, person, "only root may do that")
        refused_in_last_line(received, person, "only root may do that")
        assert stream.stat().st_size == 0
    assert running.status("demo")["state"] == "running"
