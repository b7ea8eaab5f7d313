"""The ports at which programs of the host listen, from the tables of a kernel."""

from pathlib import Path

import pytest

from vmd.config.model import Forward
from vmd.parent import hostports
from vmd.parent.hostports import in_the_way, listening

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ANY6 = "0" * 32
LOOP6 = "0" * 24 + "01000000"
MAPPED = "0" * 16 + "FFFF0000"


def row(address: str, port: int, state: str = "0A") -> str:
    """Return the line of a socket."""
    return f"   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a table with sockets; the others are missing."""
    path = tmp_path / "tcp"
    missing = str(tmp_path / "missing")
    monkeypatch.setattr(hostports, "TABLES", {False: (missing, str(path)), True: (missing, missing)})
    return path


@pytest.mark.parametrize(
    ("line", "ports"),
    [
        (row("00000000", 22), [22]),
        (row("0100000A", 0xABCD), [0xABCD]),
        (row("00000000", 22, "01"), []),  # a connection
        (row("0100007F", 22), []),
        (row("0200017F", 22), []),  # 127.1.0.2
        (row("7F000001", 22), [22]),  # 1.0.0.127
        (row(ANY6, 22), [22]),
        (row(LOOP6, 22), []),
        (row("0" * 31 + "1", 22), [22]),
        (row("0" * 30 + "7F", 22), [22]),  # only four bytes are an IPv4 address
        (row(MAPPED + "0100007F", 22), []),
        (row(MAPPED + "0100000A", 22), [22]),
        ("   0: 00000000:0016 00000000:0000 0A\n", [22]),
        ("   0: 00000000:0016 00000000:0000\n", []),
        ("   0: 00000000 00000000:0000 0A\n", []),
        ("\n", []),
    ],
)
def test_a_socket_that_listens(table: Path, line: str, ports: list[int]) -> None:
    """Not one of the loopback interface: packets for that are not forwarded."""
    table.write_text(HEAD + line)
    assert listening(str(table), "0A") == ports


def test_the_head_of_a_table_is_no_socket(table: Path) -> None:
    """The first line has names.  All others count."""
    table.write_text(row("00000000", 21) + row("00000000", 22) + row("00000000", 23))
    assert listening(str(table), "0A") == [22, 23]
    assert listening(str(table.with_name("gone")), "0A") == []


@pytest.mark.parametrize(
    ("first", "last", "found"), [(22, 22, "22"), (20, 22, "22"), (22, 80, "22"), (23, 80, "80"), (23, 79, "")]
)
def test_a_program_has_a_port_of_a_range(table: Path, first: int, last: int, found: str) -> None:
    """The sentence says how to find the program."""
    table.write_text(HEAD + row("00000000", 22) + row(ANY6, 80))
    forward = Forward(port=first, count=last - first + 1, to=first)

    words = f"a program of this host has tcp port {found}: `ss -ltnp` shows it" if found else ""
    assert in_the_way(forward) == words
    assert in_the_way(forward.replace(udp=True)) == ""


def test_programs_that_use_udp(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tables of their own, and another state."""
    forward = Forward(udp=True, port=53, to=53)
    table.write_text(HEAD + row("00000000", 53, "0A"))
    monkeypatch.setattr(hostports, "TABLES", {False: (), True: (str(table),)})
    assert in_the_way(forward) == ""
    table.write_text(HEAD + row("00000000", 53, "07"))
    assert in_the_way(forward) == "a program of this host has udp port 53: `ss -lunp` shows it"
