"""Instances (*cat. 2.6*) that users make of a template, with vmctl and with messages that vmctl never sends."""

import errno
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import load_modules
from tests.support.network import Network
from tests.support.systemdisk import ext4_disk
from tests.support.users import Users, UsersDaemon
from vmd.config.model import (
    AllowInstance,
    BootDevice,
    DiskConfig,
    NicConfig,
    Owner,
    Prefix,
    Rights,
    VmConfig,
    VmFlag,
)
from vmd.errors import VMD_PARENT_INVALID
from vmd.ipc.messages.clients import Failed, StartRequest, VmStarted
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

INES, OTHER, CLUB, MAY_CONNECT = "ines", "otto", "vmclub", "vmusers"
PROMPT = "vmd-demo> "
MIB = 1 << 20
DISK_BYTES = 1 * MIB
SECRET = b"nobody but root may read this"
TEMPLATES = ["template", "closed", "open"]

CONF = """
socket owner :{connect}

vm "template" {{
    disable
    memory 40M
    vcpus 2
    boot "{root}/kernel"
    cdrom "{root}/disc"
    disk "{root}/template.img"
    interface tap5 {{ lladdr fe:e1:ba:00:00:05 }}
    allow instance {{ boot, cdrom, disk, interface, memory, vcpus, owner {ines} }}
}}

vm "closed" {{
    disable
    memory 32M
    boot "{root}/kernel"
    allow instance {{ owner {ines} }}
}}

vm "open" {{
    disable
    memory 32M
    boot "{root}/kernel"
    allow instance {{ boot, cdrom, disk, instance, interface, memory, vcpus, owner {ines}:{club} }}
}}
"""


class Place:
    """A directory of root, which no other user may enter, and one of a user."""

    def __init__(self, path: Path, users: Users) -> None:
        self.path = path
        self.users = users
        self.root = path / "root"
        self.home = path / "home"

    def file(self, name: str, owner: str = INES, mode: int = 0o600, content: bytes = bytes(DISK_BYTES)) -> Path:
        """Make a file in the user's directory."""
        path = self.home / name
        path.write_bytes(content)
        self.users.run("chown", owner, str(path))
        path.chmod(mode)
        return path


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Give a host with users and files."""
    with tempfile.TemporaryDirectory(prefix="vmd-instances-") as name, Users(Path(name)) as users:
        path = Path(name)
        path.chmod(0o755)
        place = Place(path, users)
        for group in (CLUB, MAY_CONNECT):
            users.add_group(group)
        users.add_user(INES, MAY_CONNECT, CLUB)
        users.add_user(OTHER, MAY_CONNECT)
        place.root.mkdir(mode=0o700)
        place.home.mkdir(mode=0o755)
        users.run("chown", INES, str(place.home))
        for file, content in (
            ("kernel", guest("demo").read_bytes()),
            ("disc", bytes(DISK_BYTES)),
            ("template.img", bytes(DISK_BYTES)),
            ("secret", SECRET.ljust(DISK_BYTES, b"\0")),
        ):
            (place.root / file).write_bytes(content)
            (place.root / file).chmod(0o600)
        (place.root / "open to all").write_bytes(bytes(DISK_BYTES))
        (place.root / "open to all").chmod(0o666)
        yield place


@pytest.fixture(scope="module")
def daemon(place: Place) -> Iterator[UsersDaemon]:
    """Give a daemon with templates."""
    load_modules()
    conf = CONF.format(connect=MAY_CONNECT, root=place.root, ines=INES, club=CLUB)
    with Network() as network, UsersDaemon(place.path, place.users, network, conf) as daemon:
        yield daemon


@pytest.fixture
def vmd(daemon: UsersDaemon) -> Iterator[UsersDaemon]:
    """Yield the daemon, and restore its state afterwards."""
    conf = daemon.conf.read_text()
    before = [(name, "stopped") for name in TEMPLATES]
    yield daemon
    if daemon.conf.read_text() != conf or [(row["name"], row["state"]) for row in daemon.rows()] != before:
        daemon.must("stop", "-afw")
        daemon.conf.write_text(conf)
        daemon.must("reload")
        assert [(row["name"], row["state"]) for row in daemon.rows()] == before


def devices(vmd: UsersDaemon, name: str) -> set[str]:
    """Return which device processes a VM has."""
    return {title.rpartition("/")[2] for title in vmd.processes() if title.startswith(f"vmd: vm/{name}/")}


def open_files(vmd: UsersDaemon, name: str) -> set[str]:
    """Return the regular files that a VM's processes hold."""
    found = set()
    for title, pid in vmd.processes().items():
        if title == f"vmd: vm/{name}" or title.startswith(f"vmd: vm/{name}/"):
            fds = Path(f"/proc/{pid}/fd")
            found |= {os.readlink(fd) for fd in fds.iterdir()}
    return {path for path in found if path.startswith("/") and not path.startswith(("/dev/", "/memfd:"))}


def wait_ended(vmd: UsersDaemon, name: str) -> str:
    """Wait for the end of a VM that is not in vm.conf; return the reason."""
    waited = vmd.vmctl("wait", name)
    assert waited.returncode == 0 or "not found" in waited.stderr
    assert [row["name"] for row in vmd.rows()] == TEMPLATES
    return [line for line in vmd.log.splitlines() if f": {name}: terminated vm " in line][-1]


def refusal(answer: Record) -> Failed:
    """Check that an answer is a refusal; return it."""
    assert isinstance(answer, Failed), answer
    return answer


def start(template: str = "template", /, **fields: object) -> StartRequest:
    """Return a request for the instance `i` with these fields in its configuration."""
    return StartRequest(name="i", template=template, config=VmConfig(name="i").replace(**fields))


# --- configuration ---------------------------------------------------------------------------------------


def test_an_instance_has_what_its_template_has_but_no_disk(vmd: UsersDaemon, place: Place) -> None:
    """It has the template's kernel and disc, which its user cannot read, no disk, and its own interface and owner."""
    vmd.must_as(INES, "start", "-t", "template", "i")
    row = vmd.status("i")
    assert (row["memory_bytes"], row["vcpus"], row["owner"]) == (40 * MIB, 2, INES)
    assert devices(vmd, "i") == {"vioscsi0", "vionet0"}
    assert str(place.root / "disc") in open_files(vmd, "i")
    (nic,) = vmd.interfaces("i")
    assert nic["tap"] != "tap5"
    assert nic["lladdr"] != "fe:e1:ba:00:00:05"
    with vmd.console("i") as console:
        console.expect(PROMPT, DEADLINE_S)
    vmd.must_as(INES, "stop", "-fw", "i")
    assert [row["name"] for row in vmd.rows()] == TEMPLATES


def test_an_instance_beside_its_template(vmd: UsersDaemon) -> None:
    """Instance and template run at the same time."""
    vmd.must("start", "template")
    vmd.must_as(INES, "start", "-t", "template", "i")
    assert vmd.interfaces("template")[0]["tap"] == "tap5"
    assert {vmd.status(name)["state"] for name in ("template", "i")} == {"running"}


def test_given_values_replace_those_of_the_template(vmd: UsersDaemon, place: Place) -> None:
    """The user's memory, vcpus, disks, disc, interfaces and kernel replace the template's."""
    disk, disc = place.file("own.img"), place.file("own.iso")
    kernel = place.file("kernel", mode=0o400, content=guest("demo").read_bytes())
    place.home.chmod(0o700)
    try:
        vmd.must_as(
            INES, "start", "-t", "template", "-m", "24M", "-p", "1", "-d", f"raw:{disk}", "-r", disc, "-i", "2",
            "-b", kernel, "-k", "quiet", "i",
        )  # fmt: skip
    finally:
        place.home.chmod(0o755)
    row = vmd.status("i")
    assert (row["memory_bytes"], row["vcpus"]) == (24 * MIB, 1)
    assert devices(vmd, "i") == {"vioblk0", "vioscsi0", "vionet0", "vionet1"}
    assert {str(disk), str(disc)} <= open_files(vmd, "i")
    with vmd.console("i") as console:
        assert "small monitor" not in console.expect(PROMPT, DEADLINE_S)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("-p", "2"), "cpus"),
        (("-m", "24M"), "memory"),
        (("-d", "raw:{home}/mine"), "disks"),
        (("-i", "1"), "interfaces"),
        (("-L",), "interfaces"),
        (("-b", "{home}/mine"), "boot image"),
        (("-r", "{home}/mine"), "cdrom"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_each_aspect_has_to_be_allowed(
    vmd: UsersDaemon, place: Place, options: tuple[str, ...], what: str
) -> None:
    """A template that allows nothing can only be copied; the message names the forbidden aspect."""
    place.file("mine")
    done = vmd.vmctl_as(INES, "start", "-t", "closed", *(each.format(home=place.home) for each in options), "i")
    assert done.returncode == 1
    assert f'start vm command failed: vm "i": no permission to set {what}' in done.stderr
    vmd.must_as(INES, "start", "-t", "closed", "i")


def test_mistakes(vmd: UsersDaemon) -> None:
    """A template that does not exist, a name that is taken, a user without permission."""
    missing = vmd.vmctl_as(INES, "start", "-t", "nowhere", "i")
    assert (missing.returncode, missing.stderr) == (
        1, "vmctl: invalid template: vm i: template nowhere not found\n",
    )  # fmt: skip
    assert refusal(vmd.ask_as(INES, start("nowhere"))).code == VMD_PARENT_INVALID
    taken = vmd.vmctl_as(INES, "start", "-t", "closed", "open")
    assert "vm open already exists" in taken.stderr
    stranger = vmd.vmctl_as(OTHER, "start", "-t", "closed", "i")
    assert "has no permission to create instances of vm closed" in stranger.stderr
    initrd = vmd.vmctl("start", "-t", "open", "-I", vmd.conf, "i")
    assert "an initrd needs a boot image of its own (-b)" in initrd.stderr


@pytest.mark.parametrize("user", ["root", INES])
def test_the_disk_of_the_template_stays_the_template_s(vmd: UsersDaemon, place: Place, user: str) -> None:
    """No user can use the template's disk in an instance."""
    disk = place.root / "template.img"
    config = DiskConfig(path=str(disk), format="raw")
    failed = refusal(vmd.ask_as(user, start(given=VmFlag.DISK, disks=(config,))))
    assert (failed.code, failed.text) == (errno.EBUSY, f"vm i: disk {disk} of vm template cannot be reused")


@pytest.mark.parametrize(
    "nic",
    [NicConfig(tap="tap5"), NicConfig(lladdr=bytes.fromhex("fee1ba000005"))],
    ids=["interface", "lladdr"],
)
def test_interface_and_address_of_the_template_stay_the_template_s(vmd: UsersDaemon, nic: NicConfig) -> None:
    """No instance can have those of its template.  A user can have those of no other VM either."""
    for user in ("root", INES):
        failed = refusal(vmd.ask_as(user, start(given=VmFlag.NETWORK, nics=(nic,))))
        assert failed.code == errno.EBUSY
        assert "of vm template cannot be reused" in failed.text
    failed = refusal(vmd.ask_as(INES, start("open", given=VmFlag.NETWORK, nics=(nic,))))
    assert "is that of another vm" in failed.text


# --- the rights of the user ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "mode"),
    [("root", 0o600), ("root", 0o644), (INES, 0o400), (INES, 0o200), (OTHER, 0o600), (f"{INES}:root", 0o066)],
)
def test_a_disk_has_to_be_the_user_s_to_read_and_write(
    vmd: UsersDaemon, place: Place, owner: str, mode: int
) -> None:
    """The file's mode must let the user read and write."""
    disk = place.file("some.img", owner, mode)
    done = vmd.vmctl_as(INES, "start", "-t", "template", "-d", disk, "i")
    assert done.returncode == 1
    assert f"disk {disk}: cannot be opened for writing: uid " in done.stderr
    assert " has no permission" in done.stderr
    assert len(vmd.rows()) == len(TEMPLATES)


@pytest.mark.parametrize(("owner", "mode"), [("root", 0o666), (f"root:{CLUB}", 0o660), (INES, 0o600)])
def test_a_disk_may_be_the_user_s_through_groups_and_others(
    vmd: UsersDaemon, place: Place, owner: str, mode: int
) -> None:
    """Permissions of groups and others count, as for any program of the user."""
    disk = place.file("some.img", owner, mode)
    vmd.must_as(INES, "start", "-t", "template", "-d", f"raw:{disk}", "i")
    assert str(disk) in open_files(vmd, "i")


@pytest.mark.parametrize("kind", ["disk", "cdrom"])
def test_a_closed_directory_protects_the_files_in_it(vmd: UsersDaemon, place: Place, kind: str) -> None:
    """The mode of the file permits everybody, but its directory does not: by its path, a link, or /proc."""
    fields: dict[str, object]
    there = place.root / "open to all"
    link = place.home / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(there)
    with there.open("rb") as file:
        for path in (there, link, Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")):
            if kind == "disk":
                fields = {"given": VmFlag.DISK, "disks": (DiskConfig(path=str(path), format="raw"),)}
            else:
                fields = {"given": VmFlag.CDROM, "cdrom": str(path)}
            failed = refusal(vmd.ask_as(INES, start(**fields)))
            assert failed.text.startswith(f"{kind} {path}: "), failed.text
    link.unlink()


@pytest.mark.deep
def test_a_link_that_changes_during_the_check(vmd: UsersDaemon, place: Place) -> None:
    """Every start gets a file that the user may open, because the kernel checks the rights at the open."""
    mine, secret, link = place.file("mine.img"), place.root / "secret", place.home / "swapped"
    fresh = place.home / "fresh"
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for target in (mine, secret):
                fresh.symlink_to(target)
                fresh.replace(link)

    link.unlink(missing_ok=True)
    link.symlink_to(mine)
    swapper = threading.Thread(target=swap)
    swapper.start()
    outcomes = set()
    try:
        disk = DiskConfig(path=str(link), format="raw")
        for _ in range(40):
            answer = vmd.ask_as(INES, start("open", given=VmFlag.DISK, disks=(disk,)))
            outcomes.add(type(answer))
            if isinstance(answer, VmStarted):
                assert str(mine) in open_files(vmd, "i")
                assert str(secret) not in open_files(vmd, "i")
                vmd.must("stop", "-fw", "i")
            else:
                assert "has no permission" in refusal(answer).text
    finally:
        over.set()
        swapper.join()
        link.unlink()
    assert outcomes == {VmStarted, Failed}  # otherwise the link never changed in between


def test_a_reboot_opens_with_the_user_s_rights(vmd: UsersDaemon, place: Place) -> None:
    """A reset of the guest opens the disk again, which fails once the user may not open it any more."""
    disk = place.file("mine.img")
    vmd.must_as(INES, "start", "-t", "open", "-d", f"raw:{disk}", "i")
    with vmd.console("i") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)
        disk.chmod(0o400)
        console.type("reset\r")
        said = wait_ended(vmd, "i")
    assert f"cannot reboot: disk {disk}: cannot be opened for writing: uid " in said
    assert "has no permission" in said


def test_a_reboot_does_not_follow_a_link_to_a_file_of_root(vmd: UsersDaemon, place: Place) -> None:
    """The path may lead to another file by the time of the reboot."""
    disk = place.file("mine.img")
    vmd.must_as(INES, "start", "-t", "open", "-d", f"raw:{disk}", "i")
    with vmd.console("i") as console:
        console.expect(PROMPT, DEADLINE_S)
        disk.unlink()
        disk.symlink_to(place.root / "secret")
        console.type("reset\r")
        said = wait_ended(vmd, "i")
    disk.unlink()
    assert f"cannot reboot: disk {disk}: uid " in said
    assert "has no permission" in said


def test_a_kernel_only_the_user_can_read(vmd: UsersDaemon, place: Place) -> None:
    """The client opens it.  The daemon keeps it open for reboots, even if the file is removed."""
    kernel = place.file("kernel", mode=0o400, content=guest("demo").read_bytes())
    vmd.must_as(INES, "start", "-t", "open", "-b", kernel, "i")
    kernel.unlink()
    with vmd.console("i") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)


@pytest.mark.deep
def test_a_kernel_on_a_disk_that_only_the_user_can_read(vmd: UsersDaemon, place: Place) -> None:
    """It is read with the rights with which the disk is opened.  The template must permit another boot image."""
    made = ext4_disk(place.root / "system.img", {"demo": guest("demo").read_bytes()})
    disk = place.file("system.img", content=made.read_bytes())
    words = "-b", "disk0:/demo", "-d"
    vmd.must_as(INES, "start", "-t", "open", *words, f"raw:{disk}", "i")
    with vmd.console("i") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)
    vmd.must("stop", "-fw", "i")
    for path, template, why in (
        (place.root / "secret", "open", "has no permission"),
        (disk, "closed", "no permission to set "),
    ):
        link = place.home / "link.img"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        disks = (DiskConfig(path=str(link), format="raw"),)
        request = start(template, kernel="disk0:/demo", given=VmFlag.KERNEL, disks=disks)
        assert why in refusal(vmd.ask_as(INES, request)).text


def test_backing_files_need_the_user_s_rights(vmd: UsersDaemon, place: Place) -> None:
    """The user must have rights to backing files too, because the user has chosen their names."""
    overlay = place.home / "overlay.qcow2"
    overlay.unlink(missing_ok=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", place.root / "secret", overlay, "1M"],
        check=True,
    )
    place.users.run("chown", INES, str(overlay))
    done = vmd.vmctl_as(INES, "start", "-t", "open", "-d", f"qcow2:{overlay}", "i")
    assert done.returncode == 1
    assert f"backing file {place.root}/secret: " in done.stderr
    assert "has no permission" in done.stderr


# --- instances of instances ------------------------------------------------------------------------------


def test_an_instance_of_an_instance(vmd: UsersDaemon) -> None:
    """It is possible where the template passes on its permissions."""
    vmd.must_as(INES, "start", "-t", "open", "-m", "24M", "i")
    vmd.must_as(INES, "start", "-t", "i", "-p", "2", "j")
    row = vmd.status("j")
    assert (row["memory_bytes"], row["vcpus"]) == (24 * MIB, 2)
    vmd.must_as(INES, "start", "-t", "template", "k")
    done = vmd.vmctl_as(INES, "start", "-t", "k", "l")
    assert "has no permission to create instances of vm k" in done.stderr


def test_only_a_template_gives_permissions_to_its_instances(vmd: UsersDaemon) -> None:
    """A user cannot set permissions, even where they may pass on the existing ones."""
    refused = vmd.ask_as(INES, start("open", allow=AllowInstance(flags=VmFlag.CPU, owner=Owner(uid=1))))
    assert "cannot change instance permissions" in refusal(refused).text


def test_inherited_files_are_opened_with_the_rights_of_their_user(vmd: UsersDaemon, place: Place) -> None:
    """A user's disc or kernel may be a link to a file of root when an instance of their instance is made."""
    secret, disc = place.root / "secret", place.file("mine.iso")
    vmd.must_as(INES, "start", "-t", "open", "-r", disc, "i")
    disc.unlink()
    disc.symlink_to(secret)
    for user in (INES, "root"):
        failed = refusal(vmd.ask_as(user, StartRequest(name="j", template="i")))
        assert failed.text.startswith(f"cdrom {disc}: uid "), failed.text
    disc.unlink()
    vmd.must("stop", "-fw", "i")
    with guest("demo").open("rb") as kernel:
        lie = start("open", given=VmFlag.KERNEL, kernel=str(secret))
        assert isinstance(vmd.ask_as(INES, lie, {"kernel": [kernel.fileno()]}), VmStarted)
    for user in (INES, "root"):
        failed = refusal(vmd.ask_as(user, StartRequest(name="j", template="i")))
        assert failed.text.startswith(f"kernel {secret}: uid "), failed.text


# --- messages that no vmctl would send -------------------------------------------------------------------


def lies(root: Path, home: Path) -> dict[str, tuple[StartRequest, str]]:
    """Return requests that are inconsistent or not allowed, and words of the refusals."""
    mine = DiskConfig(path=str(home / "mine.img"), format="raw")
    secret = str(root / "secret")
    return {
        "disks without the flag": (start("closed", disks=(mine,)), "no permission to set disks"),
        "interfaces without the flag": (start("closed", nics=(NicConfig(),)), "no permission to set interfaces"),
        "disc without the flag": (start("closed", cdrom=str(home / "mine.img")), "no permission to set cdrom"),
        "command line of the template": (start("closed", cmdline="single"), "needs a boot image of its own"),
        "command line twice": (
            StartRequest(name="i", template="closed", cmdline="single"), "the command line is given twice",
        ),
        "command line twice, with a description": (
            start("closed", cmdline="a").replace(cmdline="b"), "the command line is given twice",
        ),
        "kernel without a descriptor": (start(given=VmFlag.KERNEL, kernel=secret), "do not match"),
        "kernel without the flag": (start(kernel=secret), "do not match"),
        "kernel flag alone": (start(given=VmFlag.KERNEL), "do not match"),
        "initrd without a descriptor": (start(initrd=secret), "needs a boot image of its own"),
        "rights of root": (
            start("open", disks=(DiskConfig(path=secret, format="raw"),), rights=Rights(disks=Owner(uid=0, gid=0))),
            "has no permission",
        ),
        "rights of root for the disc": (
            start("open", cdrom=secret, rights=Rights(cdrom=Owner(uid=0, gid=0))), "has no permission",
        ),
        "parent": (start("open", parent="template", cdrom=secret), "has no permission"),
        "permissions": (start("open", allow=AllowInstance()), "cannot change instance permissions"),
        "five disks": (start("open", disks=(mine,) * 5), "too many disks: 5"),
        "a thousand disks": (start("open", disks=(DiskConfig(path="/x"),) * 1000), "too many disks: 1000"),
        "five interfaces": (start("open", nics=(NicConfig(),) * 5), "too many interfaces: 5"),
        "relative path": (start("open", disks=(DiskConfig(path="etc/passwd"),)), "not an absolute path"),
        "relative path of the disc": (start("open", cdrom="etc/passwd"), "not an absolute path"),
        "no path": (start("open", disks=(DiskConfig(path=""),)), "not an absolute path"),
        "NUL in a path": (start("open", disks=(DiskConfig(path="/a\0b"),)), "not an absolute path"),
        "long path": (start("open", disks=(DiskConfig(path="/" * 1024),)), "disk path too long"),
        "format": (start("open", disks=(mine.replace(format="vmdk"),)), "unrecognized disk format vmdk"),
        "serial": (
            start("open", disks=(mine.replace(serial="\n"),)), "is 1 to 20 printable ASCII characters, not '\\n'",
        ),
        "serials": (start("open", disks=(mine.replace(serial="a"),) * 2), "two disks have the serial number a"),
        "memory": (start("open", given=VmFlag.MEMORY, memory_bytes=1 << 62), "memory size too large"),
        "no memory": (start("open", given=VmFlag.MEMORY, memory_bytes=-1), "memory size must be"),
        "vcpus": (start("open", given=VmFlag.CPU, vcpus=17), "invalid number of vcpus"),
        "no vcpus": (start("open", given=VmFlag.CPU, vcpus=0), "invalid number of vcpus"),
        "encrypted": (start("open", sev=True), "not supported"),
        "tap name": (start("open", nics=(NicConfig(tap="eth0"),)), "invalid interface: eth0"),
        "tap name with a path": (start("open", nics=(NicConfig(tap="../x"),)), "invalid interface"),
        "group": (start("open", nics=(NicConfig(group="a b"),)), "invalid group name"),
        "multicast": (start("open", nics=(NicConfig(lladdr=b"\1" * 6),)), "invalid address"),
        "short address": (start("open", nics=(NicConfig(lladdr=b"\2"),)), "invalid address"),
        "rdomain": (start("open", nics=(NicConfig(rdomain=256),)), "invalid rdomain"),
        "switch": (start("open", nics=(NicConfig(switch="\x1b[2J"),)), "invalid switch name"),
        "no disc to boot from": (start("open", boot_device=BootDevice.CDROM), "the vm has no cdrom"),
        "name with a path": (start("open").replace(name="../../etc/x"), "invalid VM name"),
        "name with an escape": (start("open").replace(name="a\x1b[2J"), "invalid VM name"),
        "name with a newline": (start("open").replace(name="a\nb"), "invalid VM name"),
        "name in letters of others": (start("open").replace(name="n\u00e4me"), "invalid VM name"),
        "no name": (start("open").replace(name=""), "invalid VM name"),
        "name of 64 bytes": (start("open").replace(name="n" * 64), "vm name too long"),
        "another's name": (start("open").replace(name="template"), "vm template already exists"),
        "itself": (start("i"), "template i not found"),
        "template with an escape": (start("\x1b[2J"), "not found"),
        "no template": (start(""), "only root may start a VM that vm.conf does not describe"),
    }  # fmt: skip


@pytest.mark.parametrize("case", lies(Path("/r"), Path("/h")))
def test_false_requests(vmd: UsersDaemon, place: Place, case: str) -> None:
    """Cases 56 and 58: each is answered with a sentence.  Nothing is registered, started or opened."""
    place.file("mine.img")
    request, words = lies(place.root, place.home)[case]
    failed = refusal(vmd.ask_as(INES, request))
    assert words in failed.text, failed.text
    assert len(vmd.rows()) == len(TEMPLATES)


def test_fields_that_are_not_the_client_s_do_not_count(vmd: UsersDaemon) -> None:
    """The daemon sets owner, address plan, origin and parent itself."""
    answer = vmd.ask_as(
        INES,
        start(
            "open",
            owner=Owner(uid=0, gid=0),
            plan_id=1,
            plan_prefix4=Prefix(address=bytes([192, 168, 0, 0]), length=16),
            plan_prefix6=Prefix(address=bytes(16), length=48),
            origin="/etc/vm.conf:1",
            enabled=True,
            nics=(NicConfig(local=True),),
        ).replace(vmid=1),
    )
    assert isinstance(answer, VmStarted), answer
    assert vmd.status("i")["owner"] == INES
    assert vmd.interfaces("i")[0]["host4"].startswith("100.")


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY], ids=["a place", "for writing"])
@pytest.mark.parametrize("name", ["kernel", "initrd"])
def test_a_descriptor_has_to_be_open_for_reading(vmd: UsersDaemon, place: Place, flags: int, name: str) -> None:
    """A descriptor for the path only, or for writing, is refused, even if the user could read the file."""
    wrong = os.open(place.file("mine.img", mode=0o600), flags)
    with guest("demo").open("rb") as kernel:
        fds = {"kernel": [kernel.fileno()], "initrd": [kernel.fileno()]} | {name: [wrong]}
        request = start("open", given=VmFlag.KERNEL, kernel="/k", initrd="/i")
        failed = refusal(vmd.ask_as(INES, request, fds))
    os.close(wrong)
    assert failed.code == errno.EACCES
    assert "not open for reading" in failed.text


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "socket"])
def test_a_descriptor_has_to_be_a_file(vmd: UsersDaemon, place: Place, kind: str) -> None:
    """Descriptors of other kinds are refused before they are read."""
    reader, writer = os.pipe()
    there = {
        "directory": lambda: os.open(place.home, os.O_RDONLY),
        "fifo": lambda: os.dup(reader),
        "device": lambda: os.open("/dev/zero", os.O_RDONLY),
        "socket": lambda: os.dup(vmd.connect_as(INES).detach()),
    }[kind]()
    request = start("open", given=VmFlag.KERNEL, kernel="/k")
    failed = refusal(vmd.ask_as(INES, request, {"kernel": [there]}))
    for fd in (reader, writer, there):
        os.close(fd)
    assert "not a regular file" in failed.text


@pytest.mark.deep
def test_many_refusals_leave_nothing_behind(vmd: UsersDaemon) -> None:
    """Case 60: names that never ran take no numbers from others, and no descriptor stays open."""
    before = len(os.listdir(f"/proc/{vmd.pid}/fd"))
    number = None
    for index in range(200):
        request = start("open", disks=(DiskConfig(path="/nowhere", format="raw"),)).replace(name=f"n{index}")
        assert isinstance(vmd.ask_as("root", request), Failed)
    vmd.must_as(INES, "start", "-t", "open", "after")
    number = vmd.status("after")["id"]
    assert number < 100
    vmd.must("stop", "-fw", "after")
    assert len(os.listdir(f"/proc/{vmd.pid}/fd")) <= before + 2  # a console may be closed a moment later


# --- in vm.conf ------------------------------------------------------------------------------------------


def test_instances_in_the_configuration(vmd: UsersDaemon, place: Place) -> None:
    """Instances come before or after their template, and may have instances.  They inherit what they do not set."""
    disk = place.root / "x.img"
    disk.write_bytes(bytes(DISK_BYTES))
    vmd.conf.write_text(
        f'vm "y" instance "z" {{\n vcpus 1\n}}\nvm "x" instance "y" {{\n memory 24M\n disable\n}}\n'
        f'vm "template" instance "x" {{\n disk "{disk}" format raw\n owner {OTHER}\n}}\n' + vmd.conf.read_text()
    )
    vmd.must("reload")
    x, z = vmd.wait_state("x", "running"), vmd.wait_state("z", "running")
    assert vmd.status("y")["state"] == "stopped"
    assert (x["memory_bytes"], x["vcpus"], x["owner"]) == (40 * MIB, 2, OTHER)
    assert (z["memory_bytes"], z["vcpus"], z["owner"]) == (24 * MIB, 1, OTHER)
    assert str(disk) in open_files(vmd, "x")
    assert "vioblk0" not in devices(vmd, "z")
    vmd.must_as(OTHER, "stop", "-fw", "x")
    assert vmd.status("x")["state"] == "stopped"  # a VM of the configuration stays known


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ('vm "nowhere" instance "x" {{\n disable\n}}\n', "vm x: template nowhere not found"),
        ('vm "x" instance "x" {{\n disable\n}}\n', "vm x is an instance of itself"),
        (
            'vm "y" instance "x" {{\n disable\n}}\nvm "x" instance "y" {{\n disable\n}}\n',
            "is an instance of itself",
        ),
        (
            'vm "template" instance "x" {{\n disk "{root}/template.img"\n}}\n',
            "vm x: disk {root}/template.img of vm template cannot be reused",
        ),
        ('vm "template" instance "x" {{\n interface tap5\n}}\n', "vm x: interface tap5 of vm template cannot"),
        (
            'vm "template" instance "x" {{\n interface {{ lladdr fe:e1:ba:00:00:05 }}\n}}\n',
            "vm x: lladdr fe:e1:ba:00:00:05 of vm template cannot be reused",
        ),
    ],
    ids=["no template", "of itself", "of each other", "disk", "interface", "lladdr"],
)
def test_an_impossible_instance_is_left_out(vmd: UsersDaemon, place: Place, block: str, words: str) -> None:
    """Other VMs are kept, and the operator gets a message."""
    vmd.conf.write_text(vmd.conf.read_text() + block.format(root=place.root))
    said = vmd.must("reload")
    assert f"{vmd.conf}:" in said
    assert words.format(root=place.root) in said
    assert [row["name"] for row in vmd.rows()] == TEMPLATES


def test_an_instance_is_taken_over_by_the_configuration(vmd: UsersDaemon, place: Place) -> None:
    """A user has started a VM that vm.conf now names.  It runs on, and belongs to the configuration from then on."""
    disk = place.file("mine.img")
    vmd.must_as(INES, "start", "-t", "open", "-d", f"raw:{disk}", "i")
    pid = vmd.status("i")["pid"]
    vmd.conf.write_text(vmd.conf.read_text() + 'vm "open" instance "i" {\n disable\n memory 24M\n}\n')
    said = vmd.must("reload")
    assert "vm i: " in said
    assert "that waits for its next start" in said
    assert vmd.status("i")["pid"] == pid
    vmd.must("stop", "-fw", "i")
    vmd.must("start", "i")
    row = vmd.status("i")
    assert (row["memory_bytes"], row["owner"]) == (24 * MIB, "root")
    assert "vioblk0" not in devices(vmd, "i")
