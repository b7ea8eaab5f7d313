"""The name servers that guests get, and the warning if there are none."""

from ipaddress import ip_address
from pathlib import Path

import pytest

from vmd.parent import nameservers
from vmd.parent.nameservers import host_answers, problem, resolvers, servers

HOST4, QUAD9, IPV6 = bytes((100, 64, 1, 2)), bytes((9, 9, 9, 9)), bytes(15) + b"\7"
HEAD = "   sl  local_address rem_address   st tx_queue rx_queue\n"


def row(address: str) -> str:
    """Return a line of /proc/net/udp."""
    return f"  100: {address} 00000000:0000 07 00000000:00000000 00:00000000 00000000     0 0 1 2 0 0\n"


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that lists UDP sockets of IPv4.  The file of IPv6 is beside it."""
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
def test_a_name_server_of_the_host_for_guests(sockets: Path, file: str, address: str, answers: bool) -> None:
    """It listens on the host's address of their interface, or on all addresses."""
    (sockets.parent / file).write_text(HEAD + row(address))
    assert host_answers(HOST4) is answers


def test_a_name_server_exists(sockets: Path, tmp_path: Path) -> None:
    """It is a server of a family that the guest has an address of, or the host itself."""
    nowhere = [str(tmp_path / "none")]
    assert problem(((QUAD9,), ()), HOST4, b"", nowhere) == ""
    assert problem(((), (IPV6,)), HOST4, IPV6, nowhere) == ""
    assert problem(((), (IPV6,)), HOST4, b"", nowhere) != ""
    sockets.write_text(HEAD + row("00000000:0035"))
    assert problem(((), ()), HOST4, b"", nowhere) == ""


def test_no_name_server_exists(sockets: Path, tmp_path: Path) -> None:
    """The message names the host's servers that guests cannot reach, and what to write in vm.conf."""
    path = tmp_path / "resolv.conf"
    path.write_text("search example\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\n")
    assert servers((), [str(path)]) == ((), ())
    assert problem(((), ()), HOST4, b"", [str(path)]) == (
        f"the host has no name server that guests can reach (it has 127.0.0.53, fe80::1%eth0 in {path}), "
        "and none listens on its own address 100.64.1.2: write `local dns ADDRESS` in vm.conf"
    )
    path.write_text("".join(f"nameserver 127.0.0.{number}\n" for number in range(1, 6)))
    assert f"(it has 127.0.0.1, 127.0.0.2, 127.0.0.3 in {path})" in problem(((), ()), HOST4, b"", [str(path)])
    sockets.unlink()
    assert f"({path}.x has none)" in problem(((), ()), HOST4, b"", [f"{path}.x"])


def test_servers_of_vm_conf_come_first(tmp_path: Path) -> None:
    """If vm.conf has any, those of the host are not used.  They are sorted by family."""
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    assert servers((), [str(path)]) == ((bytes((192, 0, 2, 1)),), ())
    assert servers((QUAD9, IPV6), [str(path)]) == ((QUAD9,), (IPV6,))


RESOLV_CONF = """
# made by hand
search example.org
nameserver 127.0.0.53
nameserver 192.0.2.1
nameserver 192.0.2.1
options edns0
nameserver 2001:db8::1
nameserver fe80::1%eth0
nameserver fe80::1
nameserver ::1
nameserver 0.0.0.0
nameserver nonsense
nameserver
nameserver 192.0.2.2
nameserver 192.0.2.3
nameserver 192.0.2.4
"""


def test_name_servers_that_others_can_use(tmp_path: Path) -> None:
    """Addresses of this host or of one link are left out.  Each server is listed once, and at most three."""
    path = tmp_path / "resolv.conf"
    path.write_text(RESOLV_CONF)
    four, six = resolvers([str(path)])

    assert [str(ip_address(address)) for address in four] == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    assert [str(ip_address(address)) for address in six] == ["2001:db8::1"]


def test_the_servers_behind_a_stub_resolver(tmp_path: Path) -> None:
    """systemd-resolved keeps them in a second file.  Without any server the guest asks its gateway."""
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\n")
    assert resolvers((str(stub), str(real))) == ((), ())
    real.write_text("nameserver 192.0.2.1\n")
    assert resolvers((str(stub), str(real))) == ((bytes((192, 0, 2, 1)),), ())
    assert resolvers((str(tmp_path / "none"),)) == ((), ())
