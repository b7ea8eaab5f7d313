"""Settings of the kernel that are restored later, with a directory that stands in for /proc/sys/net."""

import os
from pathlib import Path

import pytest

from vmd.errors import HostError
from vmd.priv import sysctl
from vmd.priv.sysctl import ChangedSettings, parse

SETTING = "ipv4/ip_forward"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return that directory, with forwarding off."""
    monkeypatch.setattr("vmd.priv.sysctl.SYS", str(tmp_path / "sys"))
    monkeypatch.setattr("vmd.priv.sysctl.PRIV_DIRECTORY", str(tmp_path))
    (tmp_path / "sys/ipv4").mkdir(parents=True)
    (tmp_path / "sys" / SETTING).write_text("0\n")
    return tmp_path


def locked() -> ChangedSettings:
    """Return a record of changed settings that this process has locked."""
    kept = ChangedSettings()
    assert kept.lock()
    return kept


def test_a_changed_setting_is_restored(tree: Path) -> None:
    """Afterwards it has its earlier value, and the file is removed."""
    kept = locked()
    assert kept.change(SETTING, "1")
    assert not kept.change(SETTING, "1")
    assert sysctl.read(SETTING) == "1"
    kept.put_back()
    kept.close()

    assert sysctl.read(SETTING) == "0"
    assert [path.name for path in tree.iterdir()] == ["sys"]


def test_the_next_daemon_restores_the_settings_of_a_killed_one(tree: Path) -> None:
    """The old value is on disk before the new one is set."""
    first = locked()
    first.change(SETTING, "1")
    os.close(first.fd)  # as the kernel does for a killed process

    second = locked()
    assert second.values == {SETTING: ("0", "1")}
    second.put_back()
    assert sysctl.read(SETTING) == "0"
    second.close()


def test_a_second_owner_is_refused(tree: Path) -> None:
    """The second one gets the record when the first has closed it."""
    first = locked()
    second = ChangedSettings()
    assert not second.lock()
    first.close()
    assert second.lock()
    second.close()


def test_a_missing_setting_is_not_changed(tree: Path) -> None:
    """The kernel may have no IPv6."""
    kept = locked()
    assert not kept.change("ipv6/conf/all/forwarding", "1")
    assert sysctl.entries("ipv6/conf") == []
    kept.close()


def test_a_setting_that_the_kernel_changes_as_well_is_restored(tree: Path) -> None:
    """The kernel sets accept_redirects when forwarding is switched off.  An administrator's 0 must not become 1."""
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
    """The lines before it count.  The next line replaces it."""
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


def test_a_setting_is_not_changed_if_its_old_value_cannot_be_stored(tree: Path) -> None:
    """The file system may be full."""
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
def test_invalid_files(raw: bytes) -> None:
    """No value is taken from them."""
    assert parse(raw)[0] == {}
