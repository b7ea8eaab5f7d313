"""A real seeder process in its cell, with another user, and two memory files for each request."""

import contextlib
import os
import pwd
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from tests.support.descriptors import open_descriptors, open_files
from tests.support.seeds import public_key, seed_file, usual
from vmd.errors import OperatorError
from vmd.files import seeder
from vmd.files.prober import start_probe
from vmd.files.seeder import make_seed
from vmd.ipc.probing import ask
from vmd.ipc.seedmsg import unpack
from vmd.memfile import is_constant, memory_file
from vmd.parent.opening import SEEDER_ENTRY
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import Child
from vmd.seed.documents import seed_image
from vmd.seed.parts import FILE_MAX, PARTS_MAX, SeedParts

pytestmark = pytest.mark.root

USER = pwd.getpwnam("nobody")  # any user will do, because `_vmd` may not exist on a test host
DEADLINE_S = 60.0
HELD = 4  # the number of descriptors of an idle seeder
SECRET = "c2VjcmV0"


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell."""
    built = Cell.build(USER.pw_uid, USER.pw_gid)
    yield built
    built.close()


class Seeder:
    """A seeder, or a process in its place, and its log."""

    def __init__(self, cell: Cell | None, entry: str = SEEDER_ENTRY) -> None:
        self.log, writer = os.pipe()
        try:
            self.child: Child
            self.child, self.sock = start_probe(cell, writer, entry=entry, title="seeder")
        finally:
            os.close(writer)

    def make(self, parts: SeedParts) -> tuple[bytes, list[str]]:
        """Have a seed made; return it and its warnings.  Raises OperatorError."""
        with memory() as packed, memory() as image:
            notes = make_seed(self.sock, parts, packed, image, lambda: None)
            assert is_constant(image)
            return os.pread(image, 1 << 24, 0), notes

    def refusal(self, parts: SeedParts) -> str:
        """Return the reason why a seed is refused."""
        with pytest.raises(OperatorError) as refused:
            self.make(parts)
        return str(refused.value)

    def ask(self, raw: bytes) -> tuple[list[str] | str, int]:
        """Have it read any bytes; return its answer, or "" if it has ended, and the size of the disk."""
        with memory() as packed, memory() as image:
            os.write(packed, raw)
            line = ask(self.sock, [], [packed, image], DEADLINE_S)
            assert line is not None
            return unpack(line) if line else "", os.fstat(image).st_size

    def close(self) -> tuple[int | None, str]:
        """Close its socket; return its exit status and its log."""
        self.sock.close()
        status = self.child.reap(DEADLINE_S)
        self.child.kill()
        with open(self.log, errors="replace") as log:
            return status, log.read()


@contextlib.contextmanager
def memory() -> Iterator[int]:
    """Give an empty memory file."""
    fd = memory_file("seed")
    try:
        yield fd
    finally:
        os.close(fd)


def test_seeder_holds_its_socket_and_nothing_else(cell: Cell) -> None:
    """It makes the same disk as the library, several times, and keeps no file open."""
    own = usual(user_data=seed_file("geheim", "/u"))
    one = Seeder(cell)
    first, again = one.make(usual()), one.make(own)
    deadline_s = time.monotonic() + DEADLINE_S
    while len(held := open_files(one.child.pid)) > HELD:  # it answers before it closes the memory files
        assert time.monotonic() < deadline_s, held
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{one.child.pid}/status").read_text().splitlines() if ":\t" in line
    )
    title = Path(f"/proc/{one.child.pid}/comm").read_text()

    assert one.close() == (0, "")
    assert first == (seed_image(usual()), [])
    assert again == (
        seed_image(own),
        ["seed: user-data /u: cloud-init does not know its first line, which could be #cloud-config or #!"],
    )
    assert (status["Uid"], status["CapEff"], status["CapBnd"]) == (
        "\t".join([str(USER.pw_uid)] * 4),
        "0" * 16,
        "0" * 16,
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert (sorted(held), held[0], held[1], title) == ([0, 1, 2, 3], "/dev/null", "/dev/null", "seeder\n")
    assert held[3].startswith("socket:")


def test_errors_name_the_file_and_no_secret(cell: Cell) -> None:
    """A message names the option, the file and the line.  Then the seeder makes the next seed."""
    key = seed_file(f"{public_key()}\n-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n", "/k")
    one = Seeder(cell)

    assert one.refusal(usual(keys=(key,))).startswith("seed: ssh-key /k:2: a private key")
    assert one.refusal(usual(password_hash=SECRET)).startswith("seed: password-hash: not as crypt(5) has it")
    assert one.refusal(usual(user_data=seed_file(b"#!" + bytes(FILE_MAX), "/u"))).startswith(
        "seed: user-data /u: larger"
    )
    large = tuple(seed_file(bytes(FILE_MAX)) for _ in range(4))
    assert one.refusal(usual(keys=large)) == "seed: its files have together more than 4 MiB"
    assert one.make(usual()) == (seed_image(usual()), [])
    status, log = one.close()
    assert (status, SECRET in log) == (0, False)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "cannot be made: SeedParts: not msgpack"),
        (SECRET.encode(), "cannot be made: SeedParts: not msgpack"),
        (msgpack.packb({"vm": "web", "version": 99}), "cannot be made: SeedParts of version 99, where this vmd reads"),
        (msgpack.packb({"vm": "web", "keys": [SECRET]}), "cannot be made: SeedParts.keys: str has no fields"),
        (msgpack.packb({"vm": "web", "user": [SECRET]}), "cannot be made: SeedParts.user: list is not str"),
        (bytes(PARTS_MAX + 1), "its files have together more than 4 MiB"),
        (b"\x91" * PARTS_MAX, "cannot be made: SeedParts: not msgpack"),
    ],
)
def test_malformed_parts_are_refused(cell: Cell, raw: bytes, why: str) -> None:
    """The seeder answers with the reason, and makes no disk."""
    one = Seeder(cell)
    said, size = one.ask(raw)

    assert isinstance(said, str)
    assert (said[: len(why)], size) == (why, 0)
    assert one.close() == (0, "")


def test_memory_is_limited(cell: Cell) -> None:
    """Packed parts can become much larger objects.  At the limit the seeder ends, and makes no disk."""
    one = Seeder(cell)
    said, size = one.ask(b"\xdd" + (PARTS_MAX - 5).to_bytes(4, "big") + b"\x80" * (PARTS_MAX - 5))

    assert (said, size) == ("", 0)
    status, log = one.close()
    assert status == 1
    assert "MemoryError" in log


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("leave_open", "seed: cannot be made: seeder answered nonsense: there is no disk image"),
        ("nonsense", "seed: cannot be made: seeder answered nonsense: "),
        ("flood", "seed: cannot be made: seeder answered nonsense: line of "),
        ("die", "seed: cannot be made: seeder has ended"),
    ],
)
def test_a_seeder_that_was_taken_over(function: str, why: str) -> None:
    """Its answers are checked.  A disk that is not sealed is refused."""
    before = open_descriptors()
    one = Seeder(None, f"tests.support.imgprobes:{function}")

    assert one.refusal(usual()).startswith(why)
    one.close()
    assert open_descriptors() == before


def test_a_seeder_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails after LONGEST_S."""
    monkeypatch.setattr(seeder, "LONGEST_S", 0.1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, memory() as packed, memory() as image, pytest.raises(OperatorError) as refused:
        make_seed(ours, usual(), packed, image, lambda: None)

    assert str(refused.value) == "seed: seeder does not answer within 0.1 seconds"
