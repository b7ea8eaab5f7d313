"""`tools/setup` ends with the first step that fails, and does not record a failed step as done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Stand-ins for commands of the parts.  A failing one prints a message.
PIP = '#!/bin/sh\ncase "$*" in *--version*) exit 0 ;; *) echo "registry is unreachable" >&2; exit 1 ;; esac\n'
UNREACHABLE = '#!/bin/sh\ncase "$*" in *update*) exit 0 ;; *) echo "mirror is unreachable" >&2; exit 100 ;; esac\n'
FAILING = '#!/bin/sh\necho "failed: $0" >&2\nexit 1\n'
MISSING = "#!/bin/sh\nexit 1\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with only the script, and with programs of ours in `bin`."""
    for name in ("tools", "etc", "bin", ".venv/bin"):
        Path(tmp_path, name).mkdir(parents=True)
    shutil.copy(ROOT / "tools/setup", tmp_path / "tools")
    shutil.copy(ROOT / "etc/vmd.sysusers", tmp_path / "etc")
    Path(tmp_path, "pyproject.toml").touch()
    return tmp_path


def program(path: Path, text: str) -> None:
    """Write an executable script."""
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    """Run tools/setup with the programs of `bin` first in PATH."""
    environment = {"PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [checkout / "tools/setup", *parts], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("parts", [("venv", "user"), ("fuzzer", "user"), ("user", "venv")], ids=" ".join)
def test_a_registry_that_is_not_reached_is_noticed(checkout: Path, parts: tuple[str, ...]) -> None:
    """No later part runs.  The virtual environment does not count as installed, so the next run tries again."""
    program(checkout / ".venv/bin/python", PIP)
    program(checkout / "bin/getent", "#!/bin/sh\nexit 0\n")
    (checkout / ".venv/.installed").write_text(f"{checkout}\n")
    os.utime(checkout / ".venv/.installed", (0, 0))  # pyproject.toml is newer

    first, second = setup(checkout, *parts), setup(checkout, *parts)

    assert (first.returncode, second.returncode) == (1, 1)
    assert "registry is unreachable" in first.stderr
    assert "registry is unreachable" in second.stderr


@pytest.mark.deep  # fails with a virtual environment of an earlier setup
def test_a_start_of_the_interpreter_loads_nothing_for_this_checkout() -> None:
    """A daemon and its clients start often, and such imports took half of their start-up time."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not {"pathlib", "re", "importlib.util"} & set(done.stdout.split())


@pytest.mark.parametrize("part", ["packages run", "packages test"])
def test_a_mirror_that_is_not_reached_is_noticed(checkout: Path, part: str) -> None:
    """Later parts do not run."""
    program(checkout / "bin/dpkg-query", MISSING)
    program(checkout / "bin/apt-get", UNREACHABLE)
    program(checkout / "bin/sudo", '#!/bin/sh\nexec "$@"\n')
    program(checkout / ".venv/bin/python", FAILING)

    done = setup(checkout, *part.split(), "venv")

    assert done.returncode == 100
    assert "mirror is unreachable" in done.stderr
    assert "failed" not in done.stderr


def test_a_user_that_cannot_be_added_is_noticed(checkout: Path) -> None:
    """The later part does not run."""
    program(checkout / "bin/getent", MISSING)
    program(checkout / "bin/sudo", '#!/bin/sh\nexec "$@"\n')
    for name in ("systemd-sysusers", "useradd"):
        program(checkout / "bin" / name, FAILING)

    done = setup(checkout, "user", "interpreter")

    assert (done.returncode, done.stdout) == (1, "")
    assert "failed: " in done.stderr


@pytest.mark.parametrize("parts", [(), ("packages",), ("packages", "none"), ("user", "nothing")], ids=" ".join)
def test_wrong_usage_is_refused(checkout: Path, parts: tuple[str, ...]) -> None:
    """The exit status is 2."""
    program(checkout / "bin/getent", "#!/bin/sh\nexit 0\n")

    assert setup(checkout, *parts).returncode == 2
