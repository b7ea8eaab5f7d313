"""`make install` leaves programs that run from where it put them."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.deep, pytest.mark.root, pytest.mark.timeout(300)]


def make(rule: str, prefix: Path) -> None:
    """Run a rule with everything below one folder."""
    done = subprocess.run(["make", rule, f"PREFIX={prefix}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_programs_run_and_are_removed(tmp_path: Path) -> None:
    """Nothing of the checkout is needed to read a configuration, and uninstall takes back every file."""
    make("install", tmp_path)
    conf = tmp_path / "vm.conf"
    conf.write_text('vm "a" {\n\tmemory 64M\n\tboot "/dev/null"\n}\n')
    environment = {"PATH": os.environ["PATH"]}

    checked = subprocess.run(
        [tmp_path / "sbin/vmd", "-n", "-f", conf], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    asked = subprocess.run(
        [tmp_path / "bin/vmctl", "-s", tmp_path / "none", "status"],
        cwd="/", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (checked.returncode, checked.stderr) == (0, "configuration OK\n")
    assert (asked.returncode, asked.stdout) == (3, "")
    assert f"{tmp_path}/none" in asked.stderr
    unit = (tmp_path / "lib/systemd/system/vmd.service").read_text()
    assert f"ExecStart={tmp_path}/sbin/vmd\n" in unit
    conf.unlink()
    make("uninstall", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
