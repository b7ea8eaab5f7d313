"""Name servers for guests: whose they are, and when there is nobody to ask."""

from pathlib import Path

import pytest

from vmd.parent import nameservers
from vmd.parent.nameservers import host_answers, problem, servers

HOST4, QUAD9, IPV6 = bytes((100, 64, 1, 2)), bytes((9, 9, 9, 9)), bytes(15) + b"\7"
HEAD = "   sl  local_address rem_address   st tx_queue rx_queue\n"


def row(address: str) -> str:
    """Return a line of /proc/net/udp."""
    return f"  100: {address} 00000000:0000 07 00000000:00000000 00:00000000 00000000     0 0 1 2 0 0\n"


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a file for UDP sockets of IPv4; that of IPv6 beside it."""
    path = tmp_path / "udp"
    for name in ("udp", "udp6"):
        (tmp_path / name).write_text(HEAD)
    monkeypatch.setattr(nameservers, "UDP_SOCKETS", str(path))
    return path


@pytest.mark.parametrize(
    ("file", "address", "answers"),
    [
        ("udp", "0201A8C0:0035", False), ("udp", "3500007F:0035", False), ("udp", "00000000:0045", False),
        ("udp", "02014064:0035", True), ("udp", "00000000:0035", True),
        ("udp6", "00000000000000000000000000000000:0035", True),
        ("udp6", "00000000000000000000000001000000:0035", False),
    ],
)  # fmt: skip
def test_who_listens_for_guests(sockets: Path, file: str, address: str, answers: bool) -> None:
    """On the address of their interface, or on all."""
    (sockets.parent / file).write_text(HEAD + row(address))
    assert host_answers(HOST4) is answers


def test_there_is_somebody_to_ask(sockets: Path, tmp_path: Path) -> None:
    """A server of either family that the guest can reach, or the host."""
    nowhere = [str(tmp_path / "none")]
    assert problem(((QUAD9,), ()), HOST4, b"", nowhere) == ""
    assert problem(((), (IPV6,)), HOST4, IPV6, nowhere) == ""
    assert problem(((), (IPV6,)), HOST4, b"", nowhere) != ""
    sockets.write_text(HEAD + row("00000000:0035"))
    assert problem(((), ()), HOST4, b"", nowhere) == ""


def test_nobody_to_ask(sockets: Path, tmp_path: Path) -> None:
    """What the host has instead is named, and what to do."""
    path = tmp_path / "resolv.conf"
    path.write_text("search example\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\n")
    assert servers((), [str(path)]) == ((), ())
    assert problem(((), ()), HOST4, b"", [str(path)]) == (
        f"the host has no name server that guests can reach (it has 127.0.0.53, fe80::1%eth0 in {path}), "
        "and answers no questions itself on 100.64.1.2: write `local dns ADDRESS` in vm.conf"
    )
    sockets.unlink()
    assert f"({path}.x has none)" in problem(((), ()), HOST4, b"", [f"{path}.x"])


def test_servers_of_vm_conf_come_first(tmp_path: Path) -> None:
    """By family."""
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    assert servers((), [str(path)]) == ((bytes((192, 0, 2, 1)),), ())
    assert servers((QUAD9, IPV6), [str(path)]) == ((QUAD9,), (IPV6,))
