"""Seeds for cloud-init, from vm.conf and `vmctl start -C` to the disk that the guest reads.

`tests/unit/seed` tests the texts of a seed, and `test_seed_in_cloudinit.py` tests what cloud-init makes of them.
"""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT, demo
from tests.support.clients import connect_as
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.images import qemu
from tests.support.keeper import KeptDaemon
from tests.support.seeds import public_key
from tests.support.transfers import from_file, move, to_file
from tests.support.users import as_uid, public_folder
from vmd.config.model import SeedConfig, VmConfig
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import Failed, StartRequest
from vmd.seed.documents import instance_id
from vmd.seed.parts import SeedParts

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(400)]

EVE = 65534  # nobody
SECRET = "MARKERthatNobodySees"
HASH = f"$6$saltsalt${SECRET}yX1Y8JvE5Qq6tG0jO6o0fQ1Y4c1mT0sFv3f8o2oG3Zr4q1yA5X6i8m7a9V"
KEY = public_key(comment="me@host")
WEB = f'seed {{ hostname "web.example", user alice, ssh-key key.pub password-hash "{HASH}"\nvendor-data vendor }}'
INES = "allow instance { owner nobody }"


class Place:
    """A daemon with VMs that have seeds, and the files of the seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_files()
        (folder / "secret").mkdir(mode=0o700)
        (folder / "secret" / "user-data").write_text("#cloud-config\nbootcmd: [inherited]\n")
        self.conf = 'socket owner "nobody"\n' + demo("web", WEB) + demo("plain")
        self.conf += demo("tmpl", "seed { hostname tmpl, user-data secret/user-data }", INES)
        self.conf += demo("open", "seed", "allow instance { owner nobody, boot, seed }")
        self.vmd: KeptDaemon

    def write_files(self) -> None:
        """Write the files of the seed of `web`."""
        (self.folder / "key.pub").write_text(f"{KEY}\n")
        (self.folder / "vendor").write_text(f"#cloud-config\nruncmd: [{SECRET}]\n")

    def drop_files(self) -> None:
        """Remove the files of the seed of `web`."""
        for name in ("key.pub", "vendor"):
            (self.folder / name).unlink()

    def disc(self, name: str) -> bytes:
        """Return the content of a VM's seed disk, from the process that serves it."""
        vm = self.vmd.status(name)["pid"]  # after a restart, the processes of VMs are no descendants of the daemon
        children = Path(f"/proc/{vm}/task/{vm}/children").read_text().split()
        (disk,) = [pid for pid in children if f"vm/{name}/vioblk4" in Path(f"/proc/{pid}/cmdline").read_text()]
        (path,) = [fd for fd in Path(f"/proc/{disk}/fd").iterdir() if os.readlink(fd).startswith("/memfd:seed")]
        return path.read_bytes()

    def fails(self, *words: "str | Path") -> str:
        """Run a vmctl that must fail; return its error message."""
        done = self.vmd.vmctl(*words)
        assert (done.returncode, done.stdout) != (0, "")
        return done.stderr.removeprefix("vmctl: ").removeprefix("start vm command failed: ").rstrip("\n")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Give the daemon, for all tests."""
    with public_folder() as folder:
        made = Place(folder)
        made.vmd = KeptDaemon(folder, made.conf)
        made.vmd.conf.chmod(0o600)
        with made.vmd:
            yield made


@pytest.fixture
def web(place: Place) -> Iterator[Place]:
    """Give the place, with `web` running.  Afterwards write its files again, and stop all VMs except `web`."""
    if place.vmd.status("web")["state"] != "running":
        place.vmd.must("start", "web")
        await_prompt(place.vmd, "web")
    yield place
    place.write_files()
    for row in place.vmd.rows():
        if row["state"] != "stopped" and row["name"] != "web":
            place.vmd.must("stop", "-fw", row["name"])


def identity(name: str) -> bytes:
    """Return the line of a VM's seed that has its instance id."""
    return f'instance-id: "{instance_id(SeedParts(vm=name))}"'.encode()


def await_prompt(vmd: KeptDaemon, name: str) -> None:
    """Wait until a guest has started."""
    with vmd.console(name) as console:
        console.expect(PROMPT, DEADLINE_S)


def reset(vmd: KeptDaemon, name: str) -> None:
    """Make a demonstration guest reset itself, and wait until it has booted again."""
    with vmd.console(name) as console:
        console.answer("echo before", "before\r\n" + PROMPT)
        console.answer("reset", PROMPT)


def test_a_guest_finds_its_seed(web: Place) -> None:
    """The seed is on an additional disk, which the status does not list.  A VM without a seed has no such disk."""
    disc = web.disc("web")
    for text in (b'"web.example"', b'"alice"', HASH.encode(), KEY.encode(), SECRET.encode(), identity("web")):
        assert text in disc
    assert web.vmd.status("web")["disks"] == []
    assert "it has none" in web.fails("resize", "web", "4", "1M")
    web.vmd.must("start", "plain")
    assert [title for title in web.vmd.processes() if "vioblk" in title] == ["vmd: vm/web/vioblk4"]


def test_a_seed_is_the_same_until_its_vm_stops(web: Place) -> None:
    """It survives resets by the guest and a restart of the daemon, although its files were removed.

    The next start reads the files again.  If one is missing, the start fails, and the message names the file.
    """
    disc = web.disc("web")
    web.drop_files()
    reset(web.vmd, "web")
    assert web.disc("web") == disc
    web.vmd.restart()
    assert web.disc("web") == disc
    reset(web.vmd, "web")
    assert web.disc("web") == disc
    web.vmd.must("stop", "-fw", "web")
    missing = f"ssh-key {web.folder}/key.pub: {os.strerror(errno.ENOENT)}"
    assert web.fails("start", "web") == missing
    assert missing in web.vmd.must("status", "-v", "web")


def test_a_seed_is_sent_with_its_vm(web: Place, tmp_path: Path) -> None:
    """The receiver does not need the files, not even when the guest resets there."""
    disc = web.disc("web")
    web.drop_files()
    to_file(web.vmd, "web", tmp_path / "stream")
    assert HASH.encode() not in (tmp_path / "stream").read_bytes()[: 64 << 10].split(b"cidata")[0][: 16 << 10]
    assert from_file(web.vmd, "other", tmp_path / "stream")[0] == 0
    assert web.disc("other") == disc
    reset(web.vmd, "other")
    assert web.disc("other") == disc
    move(web.vmd, "other", "third", send=("-l",))
    assert web.disc("third") == disc
    web.vmd.restart()
    reset(web.vmd, "third")
    assert web.disc("third") == disc


def test_secrets_of_a_seed_are_not_shown(web: Place) -> None:
    """They are in no log line, in no answer to a client, and in no command line or environment of a process."""
    web.vmd.must("log", "verbose")
    web.vmd.must("stop", "-fw", "web")
    web.vmd.must("start", "web")
    await_prompt(web.vmd, "web")
    web.vmd.must("reload")
    said = [web.vmd.must("status", "-v", "--json"), web.vmd.must("status", "-v"), web.vmd.must("metrics")]
    said += [web.vmd.must("events", "-l", "--json"), web.vmd.log]
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ", "comm"):
            with contextlib.suppress(OSError):  # it has ended
                said.append((process / name).read_text(errors="replace"))
    assert not [text for text in said if SECRET in text]
    assert json.loads(said[0])["vms"]
    web.vmd.must("log", "brief")


@pytest.mark.deep
def test_a_changed_seed_counts_at_the_next_start(web: Place) -> None:
    """`vmctl reload` says that the seed has changed, but not how."""
    disc = web.disc("web")
    web.vmd.conf.write_text(web.conf.replace("user alice", "user bob"))
    assert web.vmd.must("reload") == "vmctl: vm web: seed changed; that waits for its next start\n"
    assert web.disc("web") == disc
    web.vmd.must("stop", "-fw", "web")
    web.vmd.must("start", "web")
    assert b'"bob"' in web.disc("web")
    web.vmd.must("stop", "-fw", "web")
    web.vmd.conf.write_text(web.conf)
    web.vmd.must("reload")


def test_vmctl_gives_a_new_vm_a_seed(web: Place) -> None:
    """vmctl reads the files, which may be pipes.  The daemon need not be able to read them.  A reset keeps the seed."""
    pipe = web.folder / "told"
    os.mkfifo(pipe)
    (web.folder / "hash").write_text(f"{HASH}\n")
    writer = threading.Thread(target=pipe.write_text, args=("#cloud-config\nbootcmd: [told]\n",))
    writer.start()
    web.vmd.must(
        "start", "-m", "32M", "-b", guest("demo"), "-C", "user=eve", "-C", f"ssh-key={web.folder}/key.pub",
        "-C", f"password-hash={web.folder}/hash", "-C", f"user-data={pipe}", "-C", "network-config=no", "new",
    )  # fmt: skip
    writer.join()
    disc = web.disc("new")
    for text in (b"[told]", b'"eve"', KEY.encode(), identity("new"), b'local-hostname: "new"'):
        assert text in disc
    await_prompt(web.vmd, "new")
    reset(web.vmd, "new")
    assert web.disc("new") == disc


def eve(place: Place, *words: "str | Path") -> "tuple[int, str]":
    """Run vmctl as user EVE; return its exit status and its messages."""
    done = subprocess.run(
        as_uid(EVE, sys.executable, "-m", "vmctl", "-s", place.vmd.socket, *words),
        cwd=place.vmd.code, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, "HOME": str(place.folder / "eve")},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_instances_of_users(web: Place) -> None:
    """An instance has the seed of its template, with its own name.  A seed of the user's needs `allow`."""
    (web.folder / "eve" / ".ssh").mkdir(parents=True, exist_ok=True)
    (web.folder / "eve" / ".ssh" / "id_ed25519.pub").write_text(f"{KEY}\n")
    assert eve(web, "start", "-t", "tmpl", "hers")[0] == 0
    disc = web.disc("hers")
    for text in (b"[inherited]", identity("hers"), b'local-hostname: "hers"'):
        assert text in disc
    assert b'"tmpl"' not in disc
    assert eve(web, "start", "-t", "tmpl", "-C", "ssh-key", "no") == (
        1, 'vmctl: start vm command failed: vm "no": no permission to set seed\n',
    )  # fmt: skip
    assert eve(web, "start", "-t", "open", "-C", "ssh-key", "own")[0] == 0
    assert KEY.encode() in web.disc("own")


@pytest.mark.parametrize(
    ("seed", "data"),
    [
        (SeedConfig(user_data="/etc/shadow"), None),
        (SeedConfig(user_data="/etc/shadow"), b""),
        (SeedConfig(user="\n"), b""),
        (None, b""),
        (SeedConfig(), b"\x81"),
        (SeedConfig(), b"x" * (5 << 20)),
    ],
)
def test_malformed_seeds_of_a_client_are_refused(place: Place, seed: SeedConfig | None, data: bytes | None) -> None:
    """The daemon reads no file of the host for them, and serves the next client."""
    config = VmConfig(name="i", seed=seed)
    with connect_as(place.vmd.socket, EVE, EVE) as client:
        fds = {}
        if data is not None:
            fds["seed"] = [os.memfd_create("seed")]
            os.write(fds["seed"][0], data)
        packet, order = encode(StartRequest(name="i", template="open", config=config), fds=fds)
        socket.send_fds(client, [packet], order)
        answer = decode(client.recv(MAX_MESSAGE), [], "vmd").message
        for fd in order:
            os.close(fd)
    assert isinstance(answer, Failed)
    assert "i" not in [row["name"] for row in place.vmd.rows()]


def test_a_driver_reads_the_seed_disk(web: Place) -> None:
    """The disk has the last PCI slot, so that it moves no other device.  A driver can read it."""
    conf = f'vm "blk" {{\ndisable\nmemory 64M\nboot "{guest("blk")}" cmdline "bench"\nseed\n}}\n'
    web.vmd.conf.write_text(web.conf + conf)
    web.vmd.must("reload")
    web.vmd.must("start", "blk")
    with web.vmd.console("blk") as console:
        console.expect("ready", DEADLINE_S)
        console.type("read bytes=4096 depth=1 count=8\r")
        assert "done 8 requests" in console.expect("cycles", DEADLINE_S)
    web.vmd.must("stop", "-fw", "blk")
    web.vmd.conf.write_text(web.conf)
    web.vmd.must("reload")


def test_missing_files_of_a_seed_are_named(web: Place) -> None:
    """`vmd -n` names them.  If the start fails because of a disk, the message names only the disk."""
    (web.folder / "empty").write_bytes(bytes(1 << 20))
    lines = "disable", "disk empty format raw", "seed { ssh-key nowhere.pub, user a password-hash nothing }"
    block = 'vm "blank" {\n' + "\n".join(lines) + "\n}\n"
    web.vmd.conf.write_text(web.conf + block.replace("nowhere", "key").replace("nothing", "hash"))
    (web.folder / "hash").write_text(f"{HASH}\n")
    web.vmd.must("reload")
    assert web.fails("start", "blank").startswith(f"nothing to boot from: no boot sector on disk {web.folder}/empty")
    web.vmd.conf.write_text(web.conf + block)
    check = subprocess.run(
        [sys.executable, "-m", "vmd", "-n", "-f", web.vmd.conf],
        cwd=web.vmd.code, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    for what in ("ssh-key {}/nowhere.pub", "password-hash {}/nothing"):
        assert f'vm "blank": {what.format(web.folder)}: {os.strerror(errno.ENOENT)}' in check.stderr
    web.vmd.conf.write_text(web.conf)
    web.vmd.must("reload")


@pytest.mark.deep
def test_a_snapshot_has_the_seed(web: Place) -> None:
    """After a revert to a snapshot the machine has the seed of that time."""
    image = web.folder / "disk.qcow2"
    qemu("qemu-img", "create", "-qf", "qcow2", image, 1 << 20)
    conf = web.conf + demo("snap", f'disk "{image}"', "seed { ssh-key key.pub }")
    web.vmd.conf.write_text(conf)
    web.vmd.must("reload")
    web.vmd.must("start", "snap")
    await_prompt(web.vmd, "snap")
    disc = web.disc("snap")
    web.drop_files()
    web.vmd.must("snapshot", "snap", "now")
    web.vmd.must("snapshot", "-r", "snap", "now")
    assert web.disc("snap") == disc
    reset(web.vmd, "snap")
    assert web.disc("snap") == disc
    web.vmd.must("stop", "-fw", "snap")
    web.vmd.must("snapshot", "-d", "snap", "now")
    web.vmd.conf.write_text(web.conf)
    web.vmd.must("reload")
