"""Settings that have to be put back, on a tree of files that stands for /proc/sys/net."""

import os
from pathlib import Path

import pytest

from vmd.errors import HostError
from vmd.priv import sysctl
from vmd.priv.sysctl import ChangedSettings, parse

SETTING = "ipv4/ip_forward"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give such a tree, with forwarding off."""
    monkeypatch.setattr("vmd.priv.sysctl.SYS", str(tmp_path / "sys"))
    monkeypatch.setattr("vmd.priv.sysctl.PRIV_DIRECTORY", str(tmp_path))
    (tmp_path / "sys/ipv4").mkdir(parents=True)
    (tmp_path / "sys" / SETTING).write_text("0\n")
    return tmp_path


def locked() -> ChangedSettings:
    """Return a record that is ours."""
    kept = ChangedSettings()
    assert kept.lock()
    return kept


def test_changed_and_put_back(tree: Path) -> None:
    """What was there is there again, and the file is gone."""
    kept = locked()
    assert kept.change(SETTING, "1")
    assert not kept.change(SETTING, "1")
    assert sysctl.read(SETTING) == "1"
    kept.put_back()
    kept.close()

    assert sysctl.read(SETTING) == "0"
    assert [path.name for path in tree.iterdir()] == ["sys"]


def test_what_a_killed_daemon_left_is_known_to_the_next(tree: Path) -> None:
    """The old value is on disk before the new one is set."""
    first = locked()
    first.change(SETTING, "1")
    os.close(first.fd)  # as the kernel does for the dead

    second = locked()
    assert second.values == {SETTING: ("0", "1")}
    second.put_back()
    assert sysctl.read(SETTING) == "0"
    second.close()


def test_a_second_owner_is_refused(tree: Path) -> None:
    """Until the first has let go."""
    first = locked()
    second = ChangedSettings()
    assert not second.lock()
    first.close()
    assert second.lock()
    second.close()


def test_what_is_not_there_is_not_changed(tree: Path) -> None:
    """A kernel without IPv6."""
    kept = locked()
    assert not kept.change("ipv6/conf/all/forwarding", "1")
    assert sysctl.entries("ipv6/conf") == []
    kept.close()


def test_what_changes_along_is_put_back_too(tree: Path) -> None:
    """The kernel sets accept_redirects when forwarding is switched off: an administrator's 0 shall not become 1."""
    redirects = tree / "sys/ipv4/accept_redirects"
    redirects.write_text("0\n")
    kept = locked()
    kept.remember("ipv4/accept_redirects")
    kept.change(SETTING, "1")
    redirects.write_text("1\n")
    kept.put_back()
    kept.close()

    assert sysctl.read("ipv4/accept_redirects") == "0"


def test_a_line_whose_writer_was_killed(tree: Path) -> None:
    """What stands before it counts; the next line takes its place."""
    first = locked()
    first.change(SETTING, "1")
    os.pwrite(first.fd, b'["ipv4/con', first.size)
    os.close(first.fd)

    second = locked()
    assert second.values == {SETTING: ("0", "1")}
    (tree / "sys/ipv4/other").write_text("7\n")
    second.change("ipv4/other", "8")
    assert parse(Path(second.path).read_bytes()) == (
        {SETTING: ("0", "1"), "ipv4/other": ("7", "8")},
        os.path.getsize(second.path),
    )
    second.put_back()
    assert os.path.getsize(second.path) == 0
    second.close()


def test_nothing_is_changed_whose_old_value_cannot_be_kept(tree: Path) -> None:
    """A full file system."""
    kept = locked()
    read_only = os.open(kept.path, os.O_RDONLY)
    os.dup2(read_only, kept.fd)
    os.close(read_only)

    with pytest.raises(HostError, match="write"):
        kept.change(SETTING, "1")
    assert sysctl.read(SETTING) == "0"
    kept.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[", b"{}\n", b"7\n", b'["ipv4/ip_forward", "0"]\n', b'["ipv4/ip_forward", 0, 1]\n',
        b'["kernel/core_pattern", "x", "y"]\n', b'["ipv4/../../kernel/core_pattern", "x", "y"]\n', b"\xff\n",
        b'["ipv4/ip_forward", "0", "1"]',
    ],
)  # fmt: skip
def test_files_that_are_not_ours(raw: bytes) -> None:
    """Nothing of them is believed."""
    assert parse(raw)[0] == {}
