"""vmctl ssh: the guest's address, the wait for its server, its host key, and the arguments of ssh.

A real ssh is used.  With -G it prints how it would log in.
"""

import contextlib
import errno
import os
import pwd
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import schema
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, Answers, FakeDaemon, vm_info
from vmctl.commands import ssh
from vmd.ipc.devmsg import COUNTER_NAMES
from vmd.ipc.messages.clients import End, ListRequest, NicInfo, VmInfo
from vmd.record import Record

GUEST = "127.7.0.3"  # on the loopback interface, as all of 127/8
GREETING = b"SSH-2.0-OpenSSH_9.2p1\r\n"
OLD, NEW = "AAAAC3NzaC1lZDI1NTE5AAAAIOld", "AAAAC3NzaC1lZDI1NTE5AAAAINew"


def nic(**fields: object) -> NicInfo:
    """Return a `local` interface of a running VM."""
    base = {"index": 0, "tap": "tap0", "switch": "", "lladdr": bytes(6), "up": True, "locked": False, "local": True}
    return NicInfo(**{**base, "guest4": socket.inet_aton(GUEST), **fields})  # type: ignore[arg-type]


LEASED = nic(counters=tuple(int(name == "lease_s") for name in COUNTER_NAMES))


def script(daemon: FakeDaemon, *lists: VmInfo, devices: NicInfo = LEASED) -> None:
    """Answer requests for the list with these in order.  The last one is repeated."""
    left = list(lists)

    def answer(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return (left.pop(0) if len(left) > 1 else left[0], End())
        return (devices, End())

    daemon.script = answer


class Server(NamedTuple):
    """A server that greets every client."""

    port: int
    listener: socket.socket


@contextlib.contextmanager
def serving(said: bytes | Callable[[socket.socket], object]) -> Iterator[Server]:
    """Send this to each client at a port of the guest, and close; or call a function with the connection."""
    speak = said if callable(said) else lambda connection: connection.sendall(said)
    with socket.create_server((GUEST, 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        speak(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Server(listener.getsockname()[1], listener)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and stand-ins: ssh prints what it would do, and ssh-keyscan prints a file."""
    place = tmp_path / "home of 100%"
    (place / ".ssh").mkdir(parents=True)
    entry = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: pwd.struct_passwd((*entry[:5], str(place), entry[6])))
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("ssh")
    assert real is not None
    stand_in(programs / "ssh", f'exec {real} -F none -G "$@"')
    stand_in(programs / "ssh-keyscan", f'echo "$*" >{tmp_path}/asked; cat {tmp_path}/shown')
    (tmp_path / "shown").touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return place


def stand_in(path: Path, line: str) -> None:
    """Write a shell script."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def become(words: list[str]) -> None:
    """Run a program as a child, instead of replacing this process."""
    sys.stdout.write(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    sys.stdout.flush()


@pytest.fixture(autouse=True)
def _stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "become", become)
    monkeypatch.setattr(ssh, "QUIET_S", -1.0)
    monkeypatch.setattr(ssh, "AGAIN_S", 0.01)


def settings(output: str) -> dict[str, str]:
    """Return the settings that ssh -G prints."""
    return dict(line.split(" ", 1) for line in output.splitlines())


def test_arguments_of_ssh(vmctl: Vmctl, daemon: FakeDaemon, home: Path) -> None:
    """It gets the guest's address, the seed's user, and host keys under the VM's name.

    The user's own options come first.
    """
    script(daemon, vm_info(nics=(nic(local=False, guest4=b""), nic(index=1)), login="ann"))
    with serving(b"hello\r\n" + GREETING) as guest:
        status, output, errors = vmctl("ssh", "-p", str(guest.port), "web", "--", "ls", "-l", "--", "")
        typed = ["-o", "StrictHostKeyChecking=yes", "-i", str(home), "-l", "bob", "-oUserKnownHostsFile=/dev/null"]
        _, other, _ = vmctl("ssh", *typed, "-p", str(guest.port), "web")

    assert (status, errors) == (0, "")
    said = settings(output)
    assert (said["hostname"], said["port"], said["user"]) == (GUEST, str(guest.port), "ann")
    assert (said["hostkeyalias"], said["stricthostkeychecking"]) == ("web.vmd", "accept-new")
    assert said["userknownhostsfile"] == f"{home}/.ssh/known_hosts.vmd"
    assert (said["globalknownhostsfile"], said["checkhostip"], said["hashknownhosts"]) == ("none", "no", "no")
    said = settings(other)
    assert (said["user"], said["identityfile"], said["stricthostkeychecking"]) == ("bob", str(home), "true")
    assert said["userknownhostsfile"] == "/dev/null"


@pytest.mark.usefixtures("home")
def test_another_host_with_the_guest_s_address_is_not_reached(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """ssh uses the host's address on the VM's interface, so it cannot reach one elsewhere, as in an rdomain."""
    script(daemon, vm_info(nics=(nic(host4=socket.inet_aton("127.0.0.9")),)))
    with serving(GREETING) as guest:
        _, output, _ = vmctl("ssh", "-p", str(guest.port), "web")
        script(daemon, vm_info(nics=(nic(host4=socket.inet_aton("192.0.2.77")),)))
        status, _, errors = vmctl("ssh", "-p", str(guest.port), "web")
    assert settings(output)["bindaddress"] == "127.0.0.9"
    why = "192.0.2.77 is not an address of this host; if the interface is in an rdomain, use `ip vrf exec`"
    assert (status, errors) == (1, f"vmctl: ssh: vm web cannot be reached from here: {why}\n")


def test_the_command_is_passed_unchanged(tmp_path: Path, daemon: FakeDaemon) -> None:
    """vmctl becomes ssh.  Words like options and empty words are kept, and no signal is ignored."""
    script(daemon, vm_info(nics=(nic(),), login="-oProxyCommand=x"))
    stand_in(tmp_path / "ssh", 'for word; do printf "[%s]" "$word"; done; grep SigIgn /proc/$$/status; exit 7')
    with serving(GREETING) as guest:
        done = subprocess.run(
            [sys.executable, "-m", "vmctl", "-s", daemon.path, "ssh", "web", "-p", str(guest.port),
             "--", "-l", "", "--json", "--", "a b"],
            cwd=ROOT, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    assert (done.returncode, done.stderr) == (7, "")
    words, ignored = done.stdout.split("SigIgn:")
    assert words.endswith(f"[-p][{guest.port}][-l][-oProxyCommand=x][--][{GUEST}][-l][][--json][--][a b]")
    assert int(ignored, 16) & (1 << 12) == 0  # SIGPIPE


def test_without_ssh(vmctl: Vmctl, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package."""
    script(daemon, vm_info(nics=(nic(),)))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(home))
    with serving(GREETING) as guest:
        status, _, errors = vmctl("ssh", "-p", str(guest.port), "web")

    assert (status, errors) == (1, "vmctl: ssh: No such file or directory (package openssh-client)\n")


def test_a_uid_without_a_user(vmctl: Vmctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message comes before the wait for the guest."""
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)

    assert vmctl("ssh", "web") == (
        1, "", "vmctl: ssh: uid 4000000000 is not in the user database\n"
    )  # fmt: skip


@pytest.mark.parametrize(("vm", "status", "sentence"), [
    (vm_info("db"), 4, "ssh: vm web not found"),
    (vm_info(running=False), 1, "ssh: vm web is not running"),
    (vm_info(state="stopping"), 1, "ssh: vm web is stopping"),
    (vm_info(state="in doubt"), 1, "ssh: vm web is in doubt"),
    (vm_info(state="paused", nics=(nic(),)), 1, "ssh: vm web is paused: vmctl unpause lets it continue"),
    (vm_info(nics=(nic(local=False, switch="lan"),)), 1,
     "ssh: vm web has no local interface, so vmd does not know its address; use its console: vmctl console web"),
])  # fmt: skip
def test_failures_without_a_wait(vmctl: Vmctl, daemon: FakeDaemon, vm: VmInfo, status: int, sentence: str) -> None:
    """Waiting would not help, so vmctl fails at once, also with --json."""
    script(daemon, vm)

    assert vmctl("ssh", "web") == (status, "", f"vmctl: {sentence}\n")
    code, output, _ = vmctl("ssh", "--json", "web")
    assert (code, schema.check(output, "error")["error"]) == (status, sentence)


@pytest.mark.usefixtures("home")
def test_each_reason_to_wait_is_printed_once(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """vmctl waits from the VM's start until its server answers.  Then ssh starts."""
    with serving(GREETING) as guest:
        script(
            daemon, vm_info(state="waiting"), vm_info(state="starting"), vm_info(state="starting"),
            vm_info(nics=(nic(tap="", guest4=b""),)), vm_info(nics=(nic(),)),
        )  # fmt: skip
        status, output, errors = vmctl("ssh", "-p", str(guest.port), "web")

    assert (status, settings(output)["hostname"]) == (0, GUEST)
    assert errors == "".join(
        f"vmctl: waiting: vm web {state}\n" for state in ("is waiting", "is starting", "has no interface yet")
    )


def test_a_vm_that_ends_is_not_waited_for(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its first boot may have failed."""
    script(daemon, vm_info(state="starting"), vm_info(running=False))

    assert vmctl("ssh", "web") == (1, "", "vmctl: waiting: vm web is starting\nvmctl: ssh: vm web is not running\n")


def test_a_closed_port(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The guest answers, but no server runs in it."""
    script(daemon, vm_info(nics=(nic(),)))
    with serving(b"") as guest:
        pass
    why = f"port {guest.port} of {GUEST} is closed: no ssh server runs in the guest"

    status, _, errors = vmctl("ssh", "-w", "0", "-p", str(guest.port), "web")

    assert (status, errors) == (1, f"vmctl: ssh: {why}; waited 0 s\n")


@pytest.mark.parametrize(("devices", "said"), [
    (LEASED, "port 22 of 192.0.2.9 cannot be reached: Network is unreachable"),
    (nic(), "the guest of vm web has not asked for its address, 192.0.2.9"),
])  # fmt: skip
def test_a_guest_that_does_not_answer(
    vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, devices: NicInfo, said: str
) -> None:
    """The message says whether the guest has asked for its address."""
    away = socket.inet_aton("192.0.2.9")
    script(daemon, vm_info(nics=(nic(guest4=away),)), devices=devices.replace(guest4=away))

    def unreachable(_where: tuple[str, int], _timeout_s: float, _ours: object) -> socket.socket:
        raise OSError(errno.ENETUNREACH, "")

    monkeypatch.setattr(socket, "create_connection", unreachable)

    assert vmctl("ssh", "-w", "0", "web") == (1, "", f"vmctl: ssh: {said}; waited 0 s\n")


@pytest.mark.parametrize(("greeting", "said"), [
    (b"", "closes the connection at once; waited 0 s"),
    (b"SSH-2.0-half", "closes the connection at once; waited 0 s"),
    (b"no SSH-2.0-x\n", "closes the connection at once; waited 0 s"),
    (b"HTTP/1.1 400\r\n" * 1000, "is not served by ssh"),
])  # fmt: skip
def test_no_greeting_of_an_ssh_server(vmctl: Vmctl, daemon: FakeDaemon, greeting: bytes, said: str) -> None:
    """The server is not ready yet, or is of another kind."""
    script(daemon, vm_info(nics=(nic(),)))
    with serving(greeting) as guest:
        status, _, errors = vmctl("ssh", "-w", "0", "-p", str(guest.port), "web")

    assert (status, errors) == (1, f"vmctl: ssh: port {guest.port} of {GUEST} {said}\n")


def test_a_server_that_takes_its_time(vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow single bytes do not extend the wait."""
    monkeypatch.setattr(ssh, "ANSWER_S", 0.2)
    script(daemon, vm_info(nics=(nic(),)))
    ended = threading.Event()

    def trickle(connection: socket.socket) -> None:
        while not ended.wait(0.05):
            connection.sendall(b"x")

    with serving(trickle) as guest:
        status, _, errors = vmctl("ssh", "-w", "0", "-p", str(guest.port), "web")
        ended.set()

    assert (status, errors) == (1, f"vmctl: ssh: port {guest.port} of {GUEST} does not answer; waited 0 s\n")


def test_a_vm_that_was_installed_again(vmctl: Vmctl, daemon: FakeDaemon, home: Path, tmp_path: Path) -> None:
    """Another host key is reported.  -n removes the old key, and keeps those of other VMs."""
    script(daemon, vm_info(nics=(nic(),)))
    known, shown = home / ".ssh/known_hosts.vmd", tmp_path / "shown"
    others = "# mine\nweb2.vmd ssh-ed25519 AAAA\nweb ssh-ed25519 AAAA\n"
    known.write_text(f"{others}web.vmd ssh-ed25519 {OLD}\n")
    with serving(GREETING) as guest:
        words = ["ssh", "-p", str(guest.port), "web"]
        shown.write_text(f"[{GUEST}]:{guest.port} ssh-ed25519 {OLD}\n")
        assert vmctl(*words)[0] == 0
        asked = Path(tmp_path, "asked").read_text()
        assert asked == f"-T 10 -t ssh-ed25519 -p {guest.port} -- {GUEST}\n"
        shown.write_text(f"[{GUEST}]:{guest.port} ssh-ed25519 {NEW}\n")
        status, output, errors = vmctl(*words)
        assert (status, output) == (1, "")
        assert errors == (
            "vmctl: ssh: vm web has another host key than at your last login: if it was installed again, "
            "vmctl ssh -n web forgets the old one\n"
        )
        assert OLD in known.read_text()
        assert vmctl(*words, "-n")[0] == 0
        assert known.read_text() == others
        assert known.stat().st_mode & 0o777 == 0o600
        known.write_text(f"web.vmd ssh-ed25519 {OLD}\n")
        for nothing in ("", "web ssh-ed25519", f"web ssh-rsa {NEW}"):  # no key of this kind: ssh reports that itself
            shown.write_text(nothing)
            assert vmctl(*words)[0] == 0
        known.write_text("web.vmd ssh-ed25519\n")  # cut off
        assert vmctl(*words)[0] == 0


def test_json(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It is for programs that log in by themselves.  vmctl does not wait."""
    script(daemon, vm_info(nics=(nic(),), login="ann"), vm_info(state="starting"))

    status, output, _ = vmctl("ssh", "--json", "web")
    assert status == 0
    assert schema.check(output, "ssh") == {
        "schema": 1, "id": 1, "name": "web", "address": GUEST, "port": 22, "user": "ann", "host_key_alias": "web.vmd"
    }  # fmt: skip
    status, output, _ = vmctl("ssh", "--json", "web")
    assert (status, schema.check(output, "error")["error"]) == (1, "vm web is starting")


@pytest.mark.parametrize("words", [
    ["-p", "0"], ["-p", "65536"], ["-p", "ssh"], ["-w", "-1"], ["-w", "1e3"], ["-w", "86401"], ["-p", "9" * 5000],
])  # fmt: skip
def test_invalid_numbers(vmctl: Vmctl, daemon: FakeDaemon, words: list[str]) -> None:
    """They are refused before any request."""
    status, _, errors = vmctl("ssh", *words, "web")

    assert (status, errors[:15], daemon.requests) == (2, "vmctl: invalid ", [])


@pytest.mark.parametrize("words", [["-p", "1"], ["-p", "65535"], ["-w", "0"], ["-w", "86400"]])
def test_valid_numbers(vmctl: Vmctl, daemon: FakeDaemon, words: list[str]) -> None:
    """Both ends belong to the range."""
    script(daemon, vm_info(nics=(nic(),)))

    assert vmctl("ssh", "--json", *words, "web")[0] == 0


def test_a_command_belongs_behind_the_dashes(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Otherwise its options would be read as those of vmctl."""
    status, _, errors = vmctl("ssh", "web", "uptime")

    assert (status, errors.splitlines()[0]) == (2, "vmctl: unexpected argument: uptime: command ... belongs after --")
    assert daemon.requests == []
