"""Settings of the kernel that are restored later, with a directory that stands in for /proc/sys/net."""

import fcntl
import os
import socket
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
    descriptors = os.listdir("/proc/self/fd")
    assert not second.lock()
    assert os.listdir("/proc/self/fd") == descriptors  # it is tried again and again
    first.close()
    assert second.lock()
    second.close()


def test_a_file_that_was_just_removed_is_made_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner has removed it between our opening and our locking.  A lock on it would keep nobody out."""
    kept = ChangedSettings()
    Path(kept.path).write_text('["ipv4/ip_forward", "0", "1"]\n')
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        flock(fd, how)
        if os.fstat(fd).st_size:
            os.unlink(kept.path)

    monkeypatch.setattr(fcntl, "flock", late)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert kept.lock()
    assert kept.values == {}
    assert not ChangedSettings().lock()
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    kept.close()
    assert not os.path.exists(kept.path)


def test_the_file_belongs_to_the_network_namespace(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel never gives the same number to two of them.  Before Linux 5.14 the inode must do."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        cookie = int.from_bytes(ours.getsockopt(socket.SOL_SOCKET, 71, 8), "little")
    assert sysctl.state_path() == f"{tree}/network-{cookie}"
    monkeypatch.setattr(sysctl, "SO_NETNS_COOKIE", 7100)
    assert sysctl.state_path() == f"{tree}/network-{os.stat('/proc/self/ns/net').st_ino}"


def test_all_settings_of_a_large_host_are_read(tree: Path) -> None:
    """It has many interfaces."""
    lines = [f'["ipv6/conf/a-long-name{number:05}/accept_ra", "1", "2"]\n' for number in range(18_000)]
    kept = ChangedSettings()
    Path(kept.path).write_text("".join(lines))
    assert kept.lock()
    assert len(kept.values) == len(lines)
    assert kept.size == os.path.getsize(kept.path)
    kept.close()


ACCEPT_RA = ("default", "eth0", "eth1", "tap0", "all")


def interfaces(tree: Path, **values: str) -> None:
    """Set whether interfaces accept router advertisements."""
    for name, value in values.items():
        path = tree / "sys/ipv6/conf" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "accept_ra").write_text(value)


def test_new_interfaces_do_not_keep_the_default_that_was_ours(tree: Path) -> None:
    """They have inherited it.  Those that another program has changed since stay as they are."""
    interfaces(tree, default="1", eth0="1", eth1="2", all="2")
    kept = locked()
    for name in ("default", "eth0"):
        kept.change(f"ipv6/conf/{name}/accept_ra", "2")
    kept.remember("ipv6/conf/eth1/accept_ra")
    interfaces(tree, tap0="2", tap1="0")
    kept.put_back()
    kept.close()
    found = {name: sysctl.read(f"ipv6/conf/{name}/accept_ra") for name in (*ACCEPT_RA, "tap1")}
    assert found == {"default": "1", "eth0": "1", "eth1": "2", "tap0": "1", "all": "2", "tap1": "0"}


def test_a_default_that_was_not_changed_is_not_inherited(tree: Path) -> None:
    """Interfaces with another value have it from their administrator."""
    interfaces(tree, default="0", eth0="2")
    kept = locked()
    kept.remember("ipv6/conf/default/accept_ra")
    kept.put_back()
    kept.close()
    assert sysctl.read("ipv6/conf/eth0/accept_ra") == "2"


def test_a_setting_that_others_have_changed_since_stays(tree: Path) -> None:
    """So does one that is gone."""
    (tree / "sys/ipv4/other").write_text("7\n")
    kept = locked()
    kept.change(SETTING, "1")
    kept.change("ipv4/other", "8")
    (tree / "sys" / SETTING).write_text("2\n")
    (tree / "sys/ipv4/other").unlink()
    kept.put_back()
    assert sysctl.read(SETTING) == "2"
    assert not (tree / "sys/ipv4/other").exists()
    assert kept.values == {}
    kept.close()


def test_forwarding_that_stays_is_kept_in_the_file(tree: Path) -> None:
    """A later daemon may restore it.  What does not belong to forwarding is restored at once."""
    (tree / "sys/ipv4/conf/tap0").mkdir(parents=True)
    (tree / "sys/ipv4/conf/tap0/rp_filter").write_text("0\n")
    kept = locked()
    kept.change(SETTING, "1")
    kept.change("ipv4/conf/tap0/rp_filter", "1")
    assert kept.changes("ipv4")
    assert not kept.changes("ipv6")
    kept.put_back(["ipv4"])
    assert sysctl.read(SETTING) == "1"
    assert sysctl.read("ipv4/conf/tap0/rp_filter") == "0"
    assert kept.values == {SETTING: ("0", "1")}
    assert parse(Path(kept.path).read_bytes()) == (kept.values, kept.size)
    kept.put_back(["ipv6"])
    assert sysctl.read(SETTING) == "0"
    kept.close()


def test_the_first_old_value_is_kept(tree: Path) -> None:
    """A setting may be changed twice."""
    kept = locked()
    kept.remember(SETTING)
    assert not kept.changes("ipv4")
    kept.change(SETTING, "1")
    kept.change(SETTING, "2")
    assert Path(kept.path).read_text().count("\n") == 1
    kept.put_back()
    assert sysctl.read(SETTING) == "0"
    kept.close()


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
