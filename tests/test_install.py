"""`make install` installs programs that run from their installed place, and needs no downloads for it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, ours
from tests.support.network import Network

ROOT = Path(__file__).resolve().parent.parent
# Programs that an installation must not run if the three modules are there.
UNWANTED = ("apt-get", "pip", "pip3", "pipx", "sudo", "gcc", "cc", "git", "curl")

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


def make(rule: str, *variables: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Run a rule of this checkout's Makefile."""
    # MAKEFLAGS and similar variables would pass on the options of a make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VIRT"))}
    return subprocess.run(
        ["make", rule, *variables], cwd=ROOT, env={**environment, "PATH": path, "LC_ALL": "C"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def must(rule: str, *variables: str) -> None:
    """Run a rule of the Makefile, which must succeed."""
    done = make(rule, *variables)
    assert done.returncode == 0, done.stdout + done.stderr


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an installed program outside of the checkout."""
    return subprocess.run(
        [program, *arguments], cwd="/", env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )


def test_installed_programs_run_and_are_removed(tmp_path: Path) -> None:
    """They need no pip, no apt and no checkout, and uninstall removes every file."""
    tripwires = tmp_path / "bin"
    tripwires.mkdir()
    for name in UNWANTED:
        (tripwires / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit 1\n")
        (tripwires / name).chmod(0o755)
    prefix = tmp_path / "prefix"

    done = make("install", f"PREFIX={prefix}", path=f"{tripwires}:{os.environ['PATH']}")

    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()
    conf = tmp_path / "vm.conf"
    conf.write_text('vm "a" {\n\tmemory 64M\n\tboot "vm.conf"\n}\n')
    checked = run(prefix / "sbin/vmd", "-n", "-f", conf)
    asked = run(prefix / "bin/vmctl", "-s", tmp_path / "none", "status")
    assert (checked.returncode, checked.stdout) == (0, "")
    assert checked.stderr.endswith("configuration OK\n")
    assert (asked.returncode, asked.stdout) == (3, "")
    assert f"{tmp_path}/none" in asked.stderr
    unit = (prefix / "lib/systemd/system/vmd.service").read_text()
    assert f"ExecStart={prefix}/sbin/vmd\n" in unit
    assert f"ExecReload={prefix}/bin/vmctl reload\n" in unit
    removed, again = make("uninstall", f"PREFIX={prefix}"), make("uninstall", f"PREFIX={prefix}")
    assert [path for path in prefix.rglob("*") if path.is_file()] == []
    assert "systemctl enable --now vmd" in done.stderr
    assert f"{prefix}/sbin/vmd and {prefix}/bin/vmctl are removed" in removed.stderr
    assert "/etc/vm.conf, /var/lib/vmd and the user _vmd are left" in removed.stderr
    assert f"{prefix}/sbin/vmd and {prefix}/bin/vmctl are not installed" in again.stderr


def test_installation_for_a_package_stays_below_destdir(tmp_path: Path) -> None:
    """No installed file contains the name of the staging directory, and a failure leaves nothing there."""
    (tmp_path / "full").touch()

    failed = make("install", "PREFIX=/usr", f"DESTDIR={tmp_path}/full")
    must("install", "PREFIX=/usr", f"DESTDIR={tmp_path}/staged")

    assert failed.returncode != 0
    assert failed.stderr.startswith(f"install: {tmp_path}/full: File exists; nothing was changed\n")
    files = {path for path in (tmp_path / "staged").rglob("*") if path.is_file()}
    assert tmp_path / "staged/usr/lib/vmd/vmd.zip" in files
    assert [path for path in files if str(tmp_path).encode() in path.read_bytes()] == []


class InstalledDaemon(NetDaemon):
    """A daemon that `make install` has installed below a prefix."""

    def __init__(self, directory: Path, network: Network, conf: str, prefix: Path) -> None:
        super().__init__(directory, network, conf)
        self.vmd = [prefix / "sbin/vmd"]
        self.client = [prefix / "bin/vmctl"]
        self.code = Path("/")


@pytest.fixture
def network() -> Iterator[Network]:
    """Yield an empty network.  Check at the end that vmd has left nothing in it."""
    with Network() as made:
        yield made
        assert ours(made) == []


@pytest.mark.deep
@pytest.mark.kvm
def test_an_installation_does_not_touch_a_daemon_that_runs(network: Network, tmp_path: Path) -> None:
    """The daemon continues with its loaded code, starts VMs, and obeys the new vmctl, also after an uninstall."""
    prefix = tmp_path / "prefix"
    must("install", f"PREFIX={prefix}")
    vm = f'vm "%s" {{\n\tdisable\n\tmemory 32M\n\tboot "{guest("demo")}"\n\tlocal interface\n}}\n'
    with InstalledDaemon(tmp_path, network, vm % "a" + vm % "b" + vm % "c", prefix) as vmd:
        vmd.must("start", "a")
        (prefix / "lib/vmd/vmd.zip").write_bytes(b"an earlier version")
        must("install", f"PREFIX={prefix}")
        vmd.must("start", "b")
        assert [vmd.status(name)["state"] for name in "abc"] == ["running", "running", "stopped"]

        must("uninstall", f"PREFIX={prefix}")
        vmd.client = NetDaemon.client
        vmd.code = ROOT
        vmd.must("start", "c")
        os.kill(vmd.processes()["vmd: priv"], signal.SIGKILL)  # the next one starts from the daemon's own code, too
        vmd.must("stop", "-w", "c")
        vmd.must("start", "c")
        vmd.must("reload")

        assert [vmd.status(name)["state"] for name in "abc"] == ["running"] * 3
        assert "Traceback" not in vmd.log
