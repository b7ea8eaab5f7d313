"""An installation that fails or is killed at any step leaves complete files of the old version."""

import errno
import importlib
import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.install import (
    ARCHIVE,
    OWN,
    PLACES,
    PROGRAMS,
    ROOT,
    STAGED,
    File,
    InstallError,
    install,
    plan,
    read_places,
    uninstall,
)  # fmt: skip
from vmd.version import VERSION

STEPS = ("chmod", "fchmod", "fsync", "mkdir", "open", "replace", "unlink")
OLD = {"lib/vmd/vmd.zip": "old program", "bin/vmctl": "old script", "man/man8/vmd.8": "old page"}
NEW = {"lib/vmd/vmd.zip": "new program", "bin/vmctl": "new script", "man/man8/vmd.8": "new page", "new/file": "new"}
WHOLE = {item for version in (OLD, NEW) for item in version.items()}


def files(version: dict[str, str]) -> list[File]:
    """Return the files of a version."""
    return [File(f"/{name}", text.encode) for name, text in version.items()]


def tree(top: Path) -> dict[str, str]:
    """Return the files below a directory, with their contents."""
    return {str(path.relative_to(top)): path.read_text() for path in sorted(top.rglob("*")) if path.is_file()}


def directories(top: Path) -> set[str]:
    """Return the directories below a directory."""
    return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_dir()}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A directory with the old version installed."""
    install(files(OLD), str(tmp_path))
    return tmp_path


class Steps:
    """Wraps the calls that change files, and acts before one of them, counted from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, turn: int, act: Callable[[], None]) -> None:
        self.turn = turn
        self.act = act
        self.count = 0
        self.names: list[str] = []
        for name in STEPS:
            monkeypatch.setattr(os, name, self.before(name, getattr(os, name)))

    def before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call with the counter before it."""

        def counted(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - it replaces any function
            self.count += 1
            self.names.append(name)
            if self.count == self.turn + 1:
                self.act()
            return call(*arguments, **options)

        return counted


def no_space() -> None:
    """Fail as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def steps_of_an_installation(top: Path) -> list[str]:
    """Return the names of the calls that an installation of the new version makes."""
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, -1, no_space)
        install(files(NEW), str(top))
    return steps.names


def turns() -> Iterator[int]:
    """Yield more numbers than an installation has steps."""
    yield from range(40)


def test_a_full_disk_changes_nothing(installed: Path) -> None:
    """For every write that fails before the first file is replaced, all is undone, including directories."""
    before = tree(installed), directories(installed)
    failed = 0
    for turn in turns():
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, turn, no_space)
            with pytest.raises(InstallError) as caught:
                install(files(NEW), str(installed))
        assert "No space left on device; " in str(caught.value)
        if "nothing was changed" not in str(caught.value):
            break
        assert (tree(installed), directories(installed)) == before, steps.names
        failed += 1

    assert steps.names.count("replace") == 2  # the first replaced the program, and the second failed
    assert failed == 3 * len(NEW) + 3  # open, fchmod and fsync; the new directory's mkdir and chmod; the first replace
    assert "lib/vmd/vmd.zip" in str(caught.value)
    assert tree(installed) == {**OLD, "lib/vmd/vmd.zip": "new program"}


def test_a_kill_leaves_every_file_complete(installed: Path) -> None:
    """The program is the old or the new one, and the next installation repairs everything."""
    programs = []
    for turn in turns():
        pid = os.fork()
        if pid == 0:
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, turn, lambda: os._exit(9))
                install(files(NEW), str(installed))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = {name: text for name, text in tree(installed).items() if not name.endswith(STAGED)}
        assert all((name, text) in WHOLE for name, text in found.items())
        assert set(found) >= set(OLD)
        programs.append(found["lib/vmd/vmd.zip"])
        if os.waitstatus_to_exitcode(status) == 0:
            break
        if found != OLD:
            install(files(OLD), str(installed))
            (installed / "new/file").unlink(missing_ok=True)

    assert os.waitstatus_to_exitcode(status) == 0
    assert tree(installed) == NEW
    assert programs == sorted(programs, reverse=True)  # "old", then "new"
    assert set(programs) == {"old program", "new program"}


def test_installed_files_are_not_written_again(installed: Path) -> None:
    """A second `make install` neither writes nor renames files that are up to date."""
    install(files(NEW), str(installed))
    (installed / "lib/vmd/vmd.zip").chmod(0o600)

    assert [name for name in steps_of_an_installation(installed) if name == "replace"] == ["replace"]
    assert "replace" not in steps_of_an_installation(installed)
    assert (installed / "lib/vmd/vmd.zip").stat().st_mode & 0o777 == 0o644


def test_directories_are_readable_for_all(tmp_path: Path) -> None:
    """This does not depend on root's umask."""
    before = os.umask(0o077)
    try:
        install(files(NEW), str(tmp_path))
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o755}


def test_the_tree_of_the_first_release_is_replaced(tmp_path: Path) -> None:
    """Its modules were separate files at the place of the archive."""
    for name in ("vmd/__main__.py", "msgpack/__init__.py", "vmd-0.1.0.dist-info/METADATA"):
        Path(tmp_path, "lib/vmd", name).parent.mkdir(parents=True)
        Path(tmp_path, "lib/vmd", name).write_text("old")

    install(files(NEW), str(tmp_path))

    assert tree(tmp_path) == NEW
    assert directories(tmp_path) == {"lib", "lib/vmd", "bin", "man", "man/man8", "new"}


def places(**others: str) -> list[str]:
    """Return the arguments of a valid command line, with some places changed."""
    usual = {place: f"/x/{place}/vmd" if place in OWN else f"/x/{place}" for place in PLACES}
    usual["library"] = "/x/lib/vmd"
    return [f"{place}={path}" for place, path in (usual | others).items()]


def test_uninstall_removes_files_of_a_killed_install(tmp_path: Path) -> None:
    """It removes every file of the plan, its staged form, and our own directories."""
    given = read_places(places())
    planned = plan(given)
    for file in planned:
        path = Path(f"{tmp_path}{file.path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        Path(f"{path}{STAGED}").touch()

    uninstall(planned, given, str(tmp_path))
    uninstall(planned, given, str(tmp_path))  # there is nothing left, which is no error

    assert tree(tmp_path) == {}
    assert not directories(tmp_path) & {"x/lib/vmd", "x/doc/vmd"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (places()[:-1], "is given once"),
        ([*places(), "bin=/y"], "is given once"),
        (places(bin="usr/bin"), "bin: not a plain absolute path: usr/bin"),
        (places(bin='/usr/"bin'), "bin: not a plain absolute path"),
        (places(library="/usr/lib"), "library: its directory is removed, so its name must be vmd: /usr/lib"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_places_are_refused(words: list[str], said: str) -> None:
    """They are refused before any change: a directory of the system could be removed."""
    with pytest.raises(InstallError, match=said):
        read_places(words)


def test_completions_are_installed() -> None:
    """Each has the name that its shell searches for, and none is missing."""
    sources = {path.read_bytes() for path in (ROOT / "completions").iterdir()}

    planned = {file.path: file.content() for file in plan(read_places(places()))}

    found = {planned[path] for path in ("/x/bash/vmctl", "/x/zsh/_vmctl", "/x/fish/vmctl.fish")}
    assert found == sources


def test_the_program_is_replaced_first() -> None:
    """The scripts that run it follow."""
    assert plan(read_places(places()))[0].path == f"/x/lib/vmd/{ARCHIVE}"


def test_the_package_has_the_version_of_the_program() -> None:
    """The version is in vmd/version.py, and in debian/changelog in Debian's form."""
    first = Path(ROOT, "debian/changelog").read_text().splitlines()[0]

    assert first.split()[1] == f"({VERSION.replace('.dev', '~dev')})"


def test_a_package_build_has_all_installed_sources() -> None:
    """Sources missing from `make deb` would be noticed on other machines only."""
    makefile = Path(ROOT, "Makefile").read_text()
    (sources,) = [line.split()[2:] for line in makefile.splitlines() if line.startswith("SOURCES = ")]

    assert all(Path(ROOT, name).exists() for name in sources)
    assert {"debian", "tools", "etc", "man", "completions", "docs", "fleet", *PROGRAMS} <= set(sources)


def test_pip_would_find_every_module() -> None:
    """setuptools skips directories without __init__.py, and does not check the functions of programs."""
    project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())
    modules = [path for program in PROGRAMS for path in Path(ROOT, program).rglob("*.py")]

    assert [str(path) for path in modules if not path.with_name("__init__.py").exists()] == []
    assert set(project["project"]["scripts"]) == set(PROGRAMS)
    for entry in project["project"]["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
