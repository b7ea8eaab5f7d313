"""The Debian package in a clean Debian, with its systemd and without a network."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Terminal
from tests.support.debian import BROKEN, NEWER, built_deb, debian_root, newer_deb
from tests.support.guests import guest
from tests.systemd.box import Box
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.deep, pytest.mark.timeout(900, func_only=True)]

DEB, NEW_DEB = "/root/vmd.deb", "/root/newer.deb"
INSTALL = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "install")
STRACE = ("strace", "-f", "-qq", "-o", "/dev/null")
CONF = 'vm "demo" {\n\tmemory 32M\n\tboot "/root/demo.elf"\n\tlocal interface\n}\n'
PROMPT = "vmd-demo> "
NOT_OURS = ("/var/cache", "/var/lib/apt", "/var/lib/dpkg", "/var/log", "/etc/ld.so.cache", "/root", "/etc/machine-id")


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a later version."""
    return newer_deb(tmp_path_factory.mktemp("newer"))


@pytest.fixture
def box() -> Iterator[Box]:
    """A Debian that has only the file of our package, and a guest."""
    with Box(root=debian_root()) as box:
        box.copy(built_deb(), DEB)
        box.copy(guest("demo"), "/root/demo.elf")
        yield box


def version(box: Box) -> str:
    """Return the version of the installed vmctl."""
    return box.must("vmctl", "--version").split()[1]


def status(box: Box, name: str) -> dict[str, Any]:
    """Return the row of a VM, as the installed vmctl gets it from the running daemon."""
    (row,) = [row for row in json.loads(box.must("vmctl", "status", "--json"))["vms"] if row["name"] == name]
    found: dict[str, Any] = row
    return found


def state(box: Box, name: str) -> str:
    """Return the state of a VM."""
    return str(status(box, name)["state"])


def serving(box: Box) -> list[str]:
    """Return the lines of `vmctl version` about the daemon and its generations."""
    return [line for line in box.must("vmctl", "version").splitlines() if not line.startswith("vmctl ")]


def files(box: Box) -> dict[str, str]:
    """Return the digest of each file of the disk, without logs and files of the package manager."""
    top = box.path("/")
    found = {}
    for directory, subdirectories, names in os.walk(top):
        inside = "/" + os.path.relpath(directory, top).removeprefix(".")
        subdirectories[:] = [
            name for name in subdirectories
            if not os.path.ismount(f"{directory}/{name}") and not f"{inside.rstrip('/')}/{name}".startswith(NOT_OURS)
        ]  # fmt: skip
        found[inside] = "directory"
        for name in names:
            path = Path(directory, name)
            if not f"{inside.rstrip('/')}/{name}".startswith(NOT_OURS):
                content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
                found[f"{inside.rstrip('/')}/{name}"] = hashlib.sha256(content).hexdigest()
    return found


def test_installed_run_upgraded_and_removed(box: Box, newer: Path) -> None:
    """The steps of an operator: install, run a guest, upgrade while it runs, restart, remove."""
    box.path("/etc/vm.conf").write_text(CONF)
    box.must(*INSTALL, "nftables", "seabios", "python3-msgpack", "python3-pyroute2")
    before = files(box)

    box.must(*INSTALL, DEB)

    first = box.wait_property("vmd.service", "ActiveState", "active")
    box.wait_for(lambda: state(box, "demo") == "running", "the VM of vm.conf does not run")
    assert first["UnitFileState"] == "enabled"
    assert version(box) == VERSION
    assert box.must("vmd", "-n") == ""
    assert box.path("/usr/share/bash-completion/completions/vmctl").exists()

    before_upgrade = status(box, "demo")
    with Terminal(str(box.path(before_upgrade["tty"]))) as console:
        console.answer("", PROMPT)
        box.copy(newer, NEW_DEB)
        box.must(*INSTALL, NEW_DEB)

        assert box.properties("vmd.service")["MainPID"] not in ("0", first["MainPID"])
        assert version(box) == NEWER
        assert {**status(box, "demo"), "resident_bytes": 0} == {**before_upgrade, "resident_bytes": 0}
        generations = [f"generation 1: vmd {VERSION}, 1 VM", f"generation 2: vmd {NEWER}, 0 VMs"]
        assert serving(box) == [f"vmd {NEWER}", *generations]
        console.answer("", PROMPT)
        console.answer("reset", PROMPT)
    assert serving(box) == [f"vmd {NEWER}"]
    assert status(box, "demo")["tty"] == before_upgrade["tty"]

    box.must("systemctl", "stop", "vmd")
    box.must(*INSTALL, "--reinstall", NEW_DEB)
    assert box.properties("vmd.service")["ActiveState"] == "inactive"  # an upgrade does not start a stopped unit
    box.must("systemctl", "start", "vmd")
    box.must("apt-get", "-q", "-y", "remove", "vmd")
    assert box.run("systemctl", "is-active", "vmd").stdout == "inactive\n"
    assert box.run("pgrep", "-f", "vmd: ").stdout == ""
    box.must("apt-get", "-q", "-y", "purge", "vmd")

    after = files(box)
    left = {name for name in after if before.get(name) != after[name]}
    # The user _vmd stays, as is Debian's custom.
    assert left <= {"/etc/passwd", "/etc/passwd-", "/etc/group", "/etc/group-", "/etc/shadow", "/etc/shadow-",
                    "/etc/gshadow", "/etc/gshadow-", "/etc/.pwd.lock"}  # fmt: skip
    assert set(before) <= set(after)


def test_version_that_cannot_take_over(box: Box, tmp_path: Path) -> None:
    """The old daemon continues and serves the new vmctl.  The package reports the reason."""
    box.path("/etc/vm.conf").write_text(CONF)
    box.must(*INSTALL, DEB)
    box.wait_for(lambda: state(box, "demo") == "running", "the VM of vm.conf does not run")
    before, main = status(box, "demo"), box.properties("vmd.service")["MainPID"]
    box.copy(newer_deb(tmp_path, broken=True), NEW_DEB)

    done = box.run(*INSTALL, NEW_DEB)

    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "vmctl: the version that is installed now cannot take over:\nvmctl: this version cannot read it\n" in said
    assert "vmd: the daemon was not restarted, because its guests would end: the earlier version still runs" in said
    assert box.properties("vmd.service")["MainPID"] == main
    assert version(box) == BROKEN
    assert serving(box) == [f"vmd {VERSION}"]
    assert status(box, "demo")["pid"] == before["pid"]
    box.must("vmctl", "stop", "-fw", "demo")
    box.must("vmctl", "start", "demo")
    assert state(box, "demo") == "running"


def test_an_upgrade_that_fails_leaves_the_old_version(box: Box, newer: Path, tmp_path: Path) -> None:
    """A dependency cannot be fetched, the disk is full, or dpkg is killed at any of its renames."""
    box.path("/etc/vm.conf").write_text(CONF)
    box.must(*INSTALL, DEB)
    box.wait_for(lambda: state(box, "demo") == "running", "the VM of vm.conf does not run")
    pid = status(box, "demo")["pid"]

    box.copy(newer_deb(tmp_path, depends="python3-yaml"), NEW_DEB)
    unfetched = box.run(*INSTALL, NEW_DEB)
    assert unfetched.returncode != 0
    assert version(box) == VERSION
    assert state(box, "demo") == "running"

    box.copy(newer, NEW_DEB)
    size = box.path("/usr/lib/vmd/vmd.zip").stat().st_size
    mount = f"mount -t tmpfs -o size={size * 3 // 2} small /small"
    box.must("sh", "-ec", f"mkdir /small; {mount}; cp /usr/lib/vmd/* /small; mount --bind /small /usr/lib/vmd")
    full = box.run(*INSTALL, NEW_DEB)
    assert full.returncode != 0
    assert "No space left on device" in full.stdout + full.stderr
    assert version(box) == VERSION
    assert state(box, "demo") == "running"
    box.must("umount", "/usr/lib/vmd")

    versions, served = [], []
    for turn in range(1, 200, 5):
        inject = f"inject=rename:signal=KILL:when={turn}"
        killed = box.run("dpkg", "-i", NEW_DEB, under=[*STRACE, "-e", "trace=rename", "-e", inject])
        versions.append(version(box))
        served.append(serving(box)[0])
        assert status(box, "demo")["pid"] == pid
        if killed.returncode == 0:
            break
    assert killed.returncode == 0
    assert len(versions) > 5
    for found, old, new in ((versions, VERSION, NEWER), (served, f"vmd {VERSION}", f"vmd {NEWER}")):
        assert found == sorted(found)  # the old one, then the newer one
        assert set(found) == {old, new}
    box.must("dpkg", "--audit")
    box.must(*INSTALL, NEW_DEB)
