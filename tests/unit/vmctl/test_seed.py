"""start -C: the parts of a new VM's seed."""

import os
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.seeds import HASH, public_key
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import Answers, FakeDaemon, vm_info
from vmctl.errors import ArgumentError, CommandError
from vmctl.seed import Seed
from vmd.config.model import SeedConfig, VmFlag
from vmd.ipc.imsg import unpack
from vmd.ipc.messages.clients import End, ListRequest, StartRequest, VmStarted
from vmd.record import Record
from vmd.seed.parts import FILE_MAX, SeedFile, SeedParts


@pytest.fixture
def known(daemon: FakeDaemon) -> FakeDaemon:
    """A daemon that knows VM 3, `web`, and accepts every start."""

    def script(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return [vm_info("web", vmid=3, running=False), End()]
        return [VmStarted(vmid=3, name="new", pid=1, tty="/dev/pts/7")]

    daemon.script = script
    return daemon


def parts_of(daemon: FakeDaemon) -> SeedParts:
    """Return the parts of the seed in the last request."""
    return unpack(SeedParts, daemon.files[-1]["seed"])


def test_all_parts_of_a_seed(vmctl: Vmctl, known: FakeDaemon, tmp_path: Path) -> None:
    """The request itself has only host name and user.  The other parts are in a file."""
    key, data, hashed, disk = (tmp_path / name for name in ("a.pub", "data", "hash", "disk.raw"))
    key.write_text(public_key())
    data.write_text("#cloud-config\n")
    hashed.write_text(f"{HASH}\nmore\n")
    disk.write_bytes(b"")
    words = ["hostname=h", "user=u", f"ssh-key={key}", f"ssh-key={key}", f"password-hash={hashed}", f"user-data={data}"]
    words += [f"vendor-data={data}", f"network-config={data}", "instance-id=i-1"]
    assert vmctl("start", "-d", str(disk), *(part for word in words for part in ("-C", word)), "new")[0] == 0

    request = known.requests[-1]
    assert isinstance(request, StartRequest)
    assert request.config is not None
    assert request.config.seed == SeedConfig(hostname="h", user="u")
    assert request.config.given == VmFlag.SEED | VmFlag.DISK
    keys, file = SeedFile(name=str(key), data=key.read_bytes()), SeedFile(name=str(data), data=data.read_bytes())
    assert parts_of(known) == SeedParts(
        vm="new", instance_id="i-1", hostname="h", user="u", password_hash=HASH, keys=(keys, keys), user_data=file,
        vendor_data=file, network_config=file,
    )  # fmt: skip


def test_the_keys_of_the_user(
    vmctl: Vmctl, known: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the user's public keys are taken, without certificates.

    If there are none, the message says what to do.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("start", "-t", "web", "-C", "ssh-key", "-C", "network-config=no", "new")
    assert vmctl(*words)[2] == (
        f"vmctl: no public key in {tmp_path}/.ssh: make one with ssh-keygen, or name a file: -C ssh-key=FILE\n"
    )
    (tmp_path / ".ssh").mkdir()
    for name in ("b.pub", "a.pub", "a", "a-cert.pub"):
        (tmp_path / ".ssh" / name).write_text(name)
    assert vmctl(*words)[0] == 0
    assert [key.data for key in parts_of(known).keys] == [b"a.pub", b"b.pub"]
    assert parts_of(known).network is False

    assert vmctl("start", "-t", "web", "-C", "ssh-key=~/.ssh/a.pub", "new")[0] == 0
    assert [key.data for key in parts_of(known).keys] == [b"a.pub"]


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("colour=red",), 2, "-C colour: not a part of a seed: it is hostname, user, instance-id, ssh-key, "),
        (("hostnam=a",), 2, '-C hostnam: not a part of a seed: did you mean hostname?'),
        (("hostname",), 2, "-C hostname needs a value: -C hostname=..."),
        (("network-config=",), 2, "-C network-config needs a value: -C network-config=no"),
        (("hostname=-",), 2, "-C hostname -: no name of a host"),
        (("user=a", "user=b"), 2, "-C user specified multiple times"),
        (("network-config=no", "network-config=no"), 2, "-C network-config specified multiple times"),
        ((f"password-hash={HASH}",), 2, "-C password-hash takes the name of a file with the hash in it"),
        (("user=a", "password-hash={tmp}/plain"), 2, "-C password-hash: not as crypt(5) has it"),
        (("password-hash={tmp}/hash",), 2, "-C password-hash needs a user: -C user=..."),
        (("user-data={tmp}/none",), 1, "cannot read user-data '{tmp}/none': No such file or directory"),
        (("user-data={tmp}/large",), 1, "user-data '{tmp}/large': larger than 1024 KiB"),
    ],
)  # fmt: skip
def test_mistakes(
    vmctl: Vmctl, known: FakeDaemon, tmp_path: Path, words: tuple[str, ...], status: int, error: str
) -> None:
    """They are reported before the daemon is asked, and no password is shown."""
    (tmp_path / "plain").write_text("hunter2")
    (tmp_path / "hash").write_text(HASH)
    (tmp_path / "large").write_bytes(bytes(FILE_MAX + 1))
    options = [part for word in words for part in ("-C", word.replace("{tmp}", str(tmp_path)))]
    done = vmctl("start", "-t", "web", *options, "new")

    assert (done[0], done[1]) == (status, "")
    assert done[2].startswith(f"vmctl: {error.replace('{tmp}', str(tmp_path))}")
    assert "hunter2" not in done[2]
    assert HASH not in done[2]
    assert not [request for request in known.requests if isinstance(request, StartRequest)]


def test_a_vm_that_exists_takes_no_other_seed(vmctl: Vmctl, known: FakeDaemon) -> None:
    """It has the seed of vm.conf."""
    status, _, error = vmctl("start", "-C", "hostname=a", "web")

    assert status == 1
    assert "vm web already exists: only -B, -b, -I and -k may change one boot of it" in error
    assert known.requests


def test_the_number_of_keys(tmp_path: Path) -> None:
    """It is that of vm.conf."""
    (tmp_path / "a.pub").write_text(public_key())
    seed = Seed()
    for _ in range(64):
        seed.take(f"ssh-key={tmp_path}/a.pub")

    with pytest.raises(ArgumentError, match=r"^-C too many ssh-keys: 65 \(limit is 64\)$"):
        seed.take(f"ssh-key={tmp_path}/a.pub")


def test_a_file_that_cannot_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed."""
    before = open_descriptors()

    def fail(_fd: int, _raw: bytes) -> None:
        raise CommandError("no memory")

    monkeypatch.setattr("vmctl.seed.fill_file", fail)
    with pytest.raises(CommandError, match="no memory"):
        Seed().file("web")
    assert open_descriptors() == before


def test_the_largest_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may have a mebibyte, and all parts together what fits the memory file."""
    (tmp_path / "data").write_bytes(bytes(FILE_MAX))
    seed = Seed()
    seed.take(f"user-data={tmp_path}/data")
    with open(seed.file("web"), "rb") as file:
        raw = file.read()
    assert unpack(SeedParts, raw).user_data == SeedFile(name=f"{tmp_path}/data", data=bytes(FILE_MAX))
    monkeypatch.setattr("vmctl.seed.PARTS_MAX", len(raw))
    os.close(seed.file("web"))
    with pytest.raises(CommandError, match=f"have {len(raw) + 1} bytes, and may have {len(raw)} at most"):
        seed.file("webs")
