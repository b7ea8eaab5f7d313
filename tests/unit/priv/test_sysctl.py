"""Settings that have to be put back, on a tree of files that stands for /proc/sys/net."""

import os
from pathlib import Path

import pytest

from vmd.priv import sysctl
from vmd.priv.sysctl import Kept, parse

SETTING = "ipv4/ip_forward"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give such a tree, with forwarding off."""
    monkeypatch.setattr("vmd.priv.sysctl.SYS", str(tmp_path / "sys"))
    monkeypatch.setattr("vmd.priv.sysctl.DIRECTORY", str(tmp_path))
    (tmp_path / "sys/ipv4").mkdir(parents=True)
    (tmp_path / "sys" / SETTING).write_text("0\n")
    return tmp_path


def locked() -> Kept:
    """Return a record that is ours."""
    kept = Kept()
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
    second = Kept()
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


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"7", b'{"ipv4/ip_forward": "0"}', b'{"ipv4/ip_forward": [0, 1]}',
        b'{"kernel/core_pattern": ["x", "y"]}', b'{"ipv4/../../kernel/core_pattern": ["x", "y"]}', b"\xff",
    ],
)  # fmt: skip
def test_files_that_are_not_ours(raw: bytes) -> None:
    """Nothing of them is believed."""
    assert parse(raw) == {}
