"""A state that is whole whenever its writer is killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vmd.parent import statemem
from vmd.parent.statemem import FIRST, HEADER, StateMemory

ROUNDS_OF_KILLS = 40


@pytest.fixture
def memory() -> Iterator[StateMemory]:
    """Return an empty one."""
    made = StateMemory.create()
    yield made
    made.close()


class Cut(Exception):
    """The writer is killed here."""


def write_and_be_killed(memory: StateMemory, content: bytes, after: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Write, and be killed when `after` bytes have arrived; return whether all of it was written before that."""
    left = after

    def pwrite(fd: int, raw: memoryview, offset: int) -> int:
        nonlocal left
        if left == 0:
            raise Cut
        count = min(left, len(raw))
        left -= count
        return os_pwrite(fd, raw[:count], offset)

    os_pwrite = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        try:
            memory.write(content)
        except Cut:
            return False
    return True


def test_an_empty_one_has_nothing(memory: StateMemory) -> None:
    """A daemon that was killed before it wrote anything has left no state."""
    assert memory.read() is None


def test_the_last_content_counts(memory: StateMemory) -> None:
    """Contents may grow and shrink; none overwrites the one before, which counts until the new one is whole."""
    sizes = random.Random(1)
    for number in range(200):
        content = bytes([number]) * sizes.choice((0, 1, 100, FIRST, 3 * FIRST + 7))
        memory.write(content)
        assert memory.read() == content


def test_the_file_does_not_grow_with_each_write(memory: StateMemory) -> None:
    """Contents of one size take the room of two, or of three for a moment."""
    for number in range(50):
        memory.write(bytes([number]) * 10000)
        assert os.fstat(memory.fd).st_size <= FIRST + 3 * 10000


def test_a_write_that_is_cut_anywhere_leaves_the_old_or_the_new(
    memory: StateMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each byte: of a content that fits before the old one, of one that does not, and of the headers."""
    lengths = [40, 40, 3, 90, 17, 90]
    contents = [bytes([65 + number]) * length for number, length in enumerate(lengths)]
    memory.write(contents[0])
    for before, after in itertools.pairwise(contents):
        total = len(after) + HEADER.size
        for cut in range(total):
            assert not write_and_be_killed(memory, after, cut, monkeypatch)
            assert memory.read() == before, cut
        assert write_and_be_killed(memory, after, total, monkeypatch)
        assert memory.read() == after


@pytest.mark.parametrize("byte", [*range(HEADER.size), FIRST, FIRST + 39])
def test_a_byte_that_is_not_what_was_written_takes_its_slot_out(memory: StateMemory, byte: int) -> None:
    """Whatever has happened to the newer slot, the older one counts again."""
    memory.write(b"old" * 20)
    memory.write(b"new" * 20)
    memory.write(b"the newest one, of 40 bytes in the front")  # in the first slot
    at = byte
    was = os.pread(memory.fd, 1, at)
    os.pwrite(memory.fd, bytes([was[0] ^ 0x40]), at)
    assert memory.read() == b"new" * 20


def test_a_length_that_cannot_be_is_not_read(memory: StateMemory) -> None:
    """A damaged header leads to no allocation, and to no content."""
    for length in (1 << 29, 1 << 63):
        os.pwrite(memory.fd, HEADER.pack(statemem.MAGIC, 9, FIRST, length, bytes(32)), 0)
        assert memory.read() is None


WRITER = """
import sys
from vmd.parent.statemem import StateMemory
memory, number = StateMemory(int(sys.argv[1])), 0
print("ready", flush=True)
while True:
    number += 1
    memory.write(b"%d " % number * (number * 7919 % 20000))
"""


@pytest.mark.deep
def test_whoever_reads_after_a_kill_finds_something_whole(memory: StateMemory) -> None:
    """With a real process that does nothing but write, killed at any moment, again and again."""
    memory.write(b"0 ")
    for _ in range(ROUNDS_OF_KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(memory.fd)], pass_fds=[memory.fd], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            for _ in range(random.Random(writer.pid).randrange(1, 40)):
                found = memory.read()  # while it writes this may be torn, and is not taken then
            writer.send_signal(signal.SIGKILL)
        found = memory.read()
        assert found is not None
        words = found.split()
        assert len(set(words)) <= 1, "two contents are mixed"
