"""vmctl ssh with a real ssh server: host keys of guests, commands, and their output."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.vmctl.fake import DEADLINE_S, FakeDaemon, vm_info
from tests.unit.vmctl.test_ssh import GUEST, nic, script
from tools.debian_kernel import cache_dir, fetch_package
from vmctl.__main__ import main
from vmctl.commands import ssh

pytestmark = pytest.mark.root

# Starts sshd in a mount namespace, with the /run and the /etc/passwd that it needs.
START = (
    'mount -t tmpfs none /run && mkdir /run/sshd && mount --bind "$0/passwd" /etc/passwd && '
    'exec "$1" -D -e -f "$0/sshd_config"'
)


def server() -> Path:
    """Return an ssh server from a package that is only unpacked.  An installed one would be started on this host."""
    home = cache_dir() / "openssh-server"
    if not home.exists():
        fetch_package("openssh-server", home)
    return home / "usr/sbin/sshd"


class Guest:
    """An ssh server at the address of a guest, with one host key, and one key of one user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = server()
        self.key = folder / "key"
        self.host_key = folder / "host_key"
        with socket.create_server((GUEST, 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        keygen(self.key)
        shutil.copy(f"{self.key}.pub", folder / "authorized_keys")
        users = Path("/etc/passwd").read_text()
        (folder / "passwd").write_text(f"{users}sshd:x:59999:59999::/run/sshd:/usr/sbin/nologin\n")
        (folder / "sshd_config").write_text(
            f"ListenAddress {GUEST}:{self.port}\nHostKey {self.host_key}\nAuthorizedKeysFile {folder}/authorized_keys\n"
            "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
        )

    def start(self) -> None:
        """Start the server with a new host key, as after a new installation of the guest."""
        self.stop()
        for path in (self.host_key, Path(f"{self.host_key}.pub")):
            path.unlink(missing_ok=True)
        keygen(self.host_key)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", START, self.folder, self.server],
                stdin=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        """End the server."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(DEADLINE_S)


def keygen(path: Path) -> None:
    """Make a key pair."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """Give a guest whose server is not started yet."""
    found = Guest(tmp_path)
    yield found
    found.stop()


def test_a_guest_is_known_by_the_name_of_its_vm(
    tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its host key is recorded at the first login.  Another host key is refused later, except with -n."""
    user = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: pwd.struct_passwd((*user[:5], str(tmp_path), user[6])))
    known = tmp_path / ".ssh/known_hosts.vmd"
    known.parent.mkdir()
    statuses: list[int] = []
    monkeypatch.setattr(ssh, "become", lambda words: statuses.append(subprocess.run(words, check=False).returncode))
    daemon = FakeDaemon(tmp_path / "vmd.sock")

    def vmctl(name: str, command: str, *words: str) -> tuple[int, str, str]:
        """Log in; return the status of ssh, or of vmctl if it did not start ssh, and the output and errors."""
        script(daemon, vm_info(name, nics=(nic(),), login=user.pw_name))
        options = ("-i", str(guest.key), "-o", "IdentitiesOnly=yes", "-p", str(guest.port))
        statuses.clear()
        status = main(["-s", str(daemon.path), "ssh", *words, *options, name, "--", command])
        return (statuses[0] if statuses else status, *capfd.readouterr())

    guest.start()
    assert vmctl("web", "id -u; exit 3") == (3, f"{user.pw_uid}\n", "")
    first = known.read_text()
    assert first.split() == ["web.vmd", *Path(f"{guest.host_key}.pub").read_text().split()[:2]]
    assert vmctl("web", "echo again") == (0, "again\n", "")
    assert known.read_text() == first

    guest.start()
    status, _, errors = vmctl("web", "true")
    assert (status, errors[:42]) == (1, "vmctl: ssh: vm web has another host key th")
    with monkeypatch.context() as patch:
        patch.setattr(ssh, "shown_key", lambda _place, _kind: "")
        status, _, errors = vmctl("web", "true")  # now ssh itself checks the key
    assert (status, "HOST IDENTIFICATION HAS CHANGED" in errors) == (255, True)
    assert vmctl("db", "echo it is another VM") == (0, "it is another VM\n", "")
    assert vmctl("web", "echo made anew", "-n") == (0, "made anew\n", "")
    assert vmctl("web", "echo known") == (0, "known\n", "")
    assert len(known.read_text().splitlines()) == 2
    daemon.close()
