"""Seeds of VMs: what the guests' cloud-init is told, from vm.conf and `vmctl start -C` to the disk that a guest reads.

What is in the texts of a seed `tests/unit/seed` holds, and what cloud-init makes of them other tests there.
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
    """A daemon with VMs that have seeds, and the files of those."""

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
        """Have the files of `web` there."""
        (self.folder / "key.pub").write_text(f"{KEY}\n")
        (self.folder / "vendor").write_text(f"#cloud-config\nruncmd: [{SECRET}]\n")

    def drop_files(self) -> None:
        """Have them gone."""
        for name in ("key.pub", "vendor"):
            (self.folder / name).unlink()

    def disc(self, name: str) -> bytes:
        """Return what the process of a VM's seed has open: all that its guest can read."""
        vm = self.vmd.status(name)["pid"]  # after a restart the daemon has no process of VMs below it
        children = Path(f"/proc/{vm}/task/{vm}/children").read_text().split()
        (disk,) = [pid for pid in children if f"vm/{name}/vioblk4" in Path(f"/proc/{pid}/cmdline").read_text()]
        (path,) = [fd for fd in Path(f"/proc/{disk}/fd").iterdir() if os.readlink(fd).startswith("/memfd:seed")]
        return path.read_bytes()

    def fails(self, *words: "str | Path") -> str:
        """Return the sentence with which vmctl fails."""
        done = self.vmd.vmctl(*words)
        assert (done.returncode, done.stdout) != (0, "")
        return done.stderr.removeprefix("vmctl: ").removeprefix("start vm command failed: ").rstrip("\n")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Give that daemon."""
    with public_folder() as folder:
        made = Place(folder)
        made.vmd = KeptDaemon(folder, made.conf)
        made.vmd.conf.chmod(0o600)
        with made.vmd:
            yield made


@pytest.fixture
def web(place: Place) -> Iterator[Place]:
    """Give it while `web` runs, which goes on if that is so afterwards; all others are stopped."""
    if place.vmd.status("web")["state"] != "running":
        place.vmd.must("start", "web")
        await_prompt(place.vmd, "web")
    yield place
    place.write_files()
    for row in place.vmd.rows():
        if row["state"] != "stopped" and row["name"] != "web":
            place.vmd.must("stop", "-fw", row["name"])


def identity(name: str) -> bytes:
    """Return how the seed of a VM says which instance it is."""
    return f'instance-id: "{instance_id(SeedParts(vm=name))}"'.encode()


def await_prompt(vmd: KeptDaemon, name: str) -> None:
    """Wait until a guest has started."""
    with vmd.console(name) as console:
        console.expect(PROMPT, DEADLINE_S)


def reset(vmd: KeptDaemon, name: str) -> None:
    """Have a demonstration guest reset itself, and wait until it is there again."""
    with vmd.console(name) as console:
        console.answer("echo before", "before\r\n" + PROMPT)
        console.answer("reset", PROMPT)


def test_a_guest_finds_its_seed(web: Place) -> None:
    """On a disk besides those that its VM has, of which nothing else is said; a VM without a seed has none."""
    disc = web.disc("web")
    for text in (b'"web.example"', b'"alice"', HASH.encode(), KEY.encode(), SECRET.encode(), identity("web")):
        assert text in disc
    assert web.vmd.status("web")["disks"] == []
    assert "it has none" in web.fails("resize", "web", "4", "1M")
    web.vmd.must("start", "plain")
    assert [title for title in web.vmd.processes() if "vioblk" in title] == ["vmd: vm/web/vioblk4"]


def test_it_is_the_same_for_all_of_a_life(web: Place) -> None:
    """After a reset by the guest, a restart of the daemon and both, though its files are gone; a new start reads them.

    Then a file that is missing is named, and nothing is left of the start.
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


def test_it_goes_where_its_guest_goes(web: Place, tmp_path: Path) -> None:
    """With `vmctl send`, from a host where its files are to one where they are not; a guest that resets there, too."""
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


def test_its_secrets_are_in_no_word_of_ours(web: Place) -> None:
    """Neither in the log, nor in any answer, nor in what processes are called; others do not see who may log in."""
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
def test_a_changed_seed_waits_for_the_next_start(web: Place) -> None:
    """`vmctl reload` says so, and not what is new."""
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
    """With files that the daemon need not be able to read, pipes too; it is kept for resets."""
    told = web.folder / "told"
    os.mkfifo(told)
    (web.folder / "hash").write_text(f"{HASH}\n")
    writer = threading.Thread(target=told.write_text, args=("#cloud-config\nbootcmd: [told]\n",))
    writer.start()
    web.vmd.must(
        "start", "-m", "32M", "-b", guest("demo"), "-C", "user=eve", "-C", f"ssh-key={web.folder}/key.pub",
        "-C", f"password-hash={web.folder}/hash", "-C", f"user-data={told}", "-C", "network-config=no", "new",
    )  # fmt: skip
    writer.join()
    disc = web.disc("new")
    for text in (b"[told]", b'"eve"', KEY.encode(), identity("new"), b'local-hostname: "new"'):
        assert text in disc
    await_prompt(web.vmd, "new")
    reset(web.vmd, "new")
    assert web.disc("new") == disc


def eve(place: Place, *words: "str | Path") -> "tuple[int, str]":
    """Run vmctl as a user; return its status and what it said."""
    done = subprocess.run(
        as_uid(EVE, sys.executable, "-m", "vmctl", "-s", place.vmd.socket, *words),
        cwd=place.vmd.code, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, "HOME": str(place.folder / "eve")},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_instances_of_users(web: Place) -> None:
    """They inherit a seed that they could not read, under their own name; one of their own needs to be allowed."""
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
def test_what_no_vmctl_would_say(place: Place, seed: SeedConfig | None, data: bytes | None) -> None:
    """Is refused, with nothing of the host's files read for it; the daemon goes on."""
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


def test_a_driver_reads_it(web: Place) -> None:
    """The disk is behind all other devices, where it moves none, and can be read to its end."""
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


def test_other_reasons_come_first(web: Place) -> None:
    """A start that fails for its disks says so; `vmd -n` names files of the seed that are missing."""
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
def test_it_is_in_a_snapshot(web: Place) -> None:
    """A machine that goes back to a snapshot has the seed that it had then."""
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
