"""A state that is complete whenever its writer is killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vmd.parent import statemem
from vmd.parent.statemem import CHANGE, FIRST, HEADER, StateMemory

ROUNDS_OF_KILLS = 40


@pytest.fixture
def memory() -> Iterator[StateMemory]:
    """Yield an empty memory."""
    made = StateMemory.create()
    yield made
    made.close()


class Cut(Exception):
    """Stands in for the kill of the writer."""


def write_and_be_killed(memory: StateMemory, content: bytes, after: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Write, and be killed after `after` bytes.  Return whether everything was written before that."""
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


def test_an_empty_memory_has_no_content(memory: StateMemory) -> None:
    """It is left by a daemon that was killed before it wrote."""
    assert memory.read() == []


def test_the_last_content_counts(memory: StateMemory) -> None:
    """Contents may grow and shrink.  The one before is not overwritten until the new one is complete."""
    sizes = random.Random(1)
    for number in range(200):
        content = bytes([number]) * sizes.choice((0, 1, 100, FIRST, 3 * FIRST + 7))
        memory.write(content)
        assert memory.read() == [content]


def test_the_file_does_not_grow_with_each_write(memory: StateMemory) -> None:
    """Contents of one size need the space of two, or of three for a moment."""
    for number in range(50):
        memory.write(bytes([number]) * 10000)
        assert os.fstat(memory.fd).st_size <= FIRST + 3 * 10000


def test_a_write_that_is_interrupted_anywhere_leaves_the_old_or_the_new_content(
    memory: StateMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut is at each byte of the content and of the header.  Some contents fit before the old one, some do not."""
    lengths = [40, 40, 3, 90, 17, 90]
    contents = [bytes([65 + number]) * length for number, length in enumerate(lengths)]
    memory.write(contents[0])
    for before, after in itertools.pairwise(contents):
        total = len(after) + HEADER.size
        for cut in range(total):
            assert not write_and_be_killed(memory, after, cut, monkeypatch)
            assert memory.read() == [before], cut
        assert write_and_be_killed(memory, after, total, monkeypatch)
        assert memory.read() == [after]


@pytest.mark.parametrize("byte", [*range(HEADER.size), FIRST, FIRST + 39])
def test_a_damaged_slot_is_ignored(memory: StateMemory, byte: int) -> None:
    """Then the older slot counts again."""
    memory.write(b"old" * 20)
    memory.write(b"new" * 20)
    memory.write(b"the newest one, of 40 bytes in the front")  # in the first slot
    at = byte
    was = os.pread(memory.fd, 1, at)
    os.pwrite(memory.fd, bytes([was[0] ^ 0x40]), at)
    assert memory.read() == [b"new" * 20]


def test_an_impossible_length_is_not_read(memory: StateMemory) -> None:
    """A damaged header causes no allocation, and gives no content."""
    for length in (1 << 29, 1 << 63):
        os.pwrite(memory.fd, HEADER.pack(statemem.MAGIC, 9, FIRST, length, bytes(32)), 0)
        assert memory.read() == []


def test_changes_are_found_after_the_content(memory: StateMemory) -> None:
    """Another program finds them, too.  Changes of an earlier content are not found."""
    chance = random.Random(2)
    expected: list[bytes] = []
    for number in range(400):
        if not memory.takes_changes:
            expected = [bytes([number % 251]) * chance.choice((10, 700, 5000))]
            memory.write(expected[0], followed=True)
        else:
            expected.append(bytes([number % 249]) * chance.choice((0, 1, 300)))
            memory.add(expected[-1])
        assert memory.read() == expected
        assert os.fstat(memory.fd).st_size < FIRST + 8 * 5300
    another = StateMemory(os.dup(memory.fd))
    assert another.read() == expected
    assert not another.takes_changes  # not before it has written its own content
    another.write(b"its own", followed=True)
    another.add(b"and more")
    assert memory.read() == [b"its own", b"and more"]
    another.close()


def test_a_content_that_is_interrupted_leaves_earlier_changes(
    memory: StateMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written by a program that takes over, and has not written those changes."""
    expected = [b"a" * 50, b"b" * 30, b"c" * 20]
    memory.write(expected[0], followed=True)
    for change in expected[1:]:
        memory.add(change)
    for cut in range(60 + HEADER.size):
        another = StateMemory(os.dup(memory.fd))
        assert not write_and_be_killed(another, b"d" * 60, cut, monkeypatch)
        assert memory.read() == expected, cut
        another.close()


def test_an_interrupted_change_does_not_count(memory: StateMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut is at each byte.  The next change replaces it."""
    memory.write(b"a" * 500, followed=True)
    memory.add(b"first")
    for cut in range(CHANGE.size + 7):
        with monkeypatch.context() as patched:
            patched.setattr(memory, "write", memory.add)
            assert not write_and_be_killed(memory, b"second!", cut, monkeypatch)
        assert memory.read() == [b"a" * 500, b"first"], cut
    memory.add(b"third")
    assert memory.read() == [b"a" * 500, b"first", b"third"]


def test_earlier_versions_do_not_read_a_content_with_changes(memory: StateMemory) -> None:
    """They look only for MAGIC, which marks contents without changes."""
    memory.write(b"plain")
    assert os.pread(memory.fd, 8, 0) == statemem.MAGIC
    memory.write(b"with changes", followed=True)
    assert os.pread(memory.fd, 8, HEADER.size) == statemem.FOLLOWED != statemem.MAGIC
    assert os.pread(memory.fd, 8, 0) != statemem.MAGIC  # they do not read the older content either
    memory.write(b"plain again")
    assert not memory.takes_changes
    assert os.pread(memory.fd, 8, 0) == statemem.MAGIC


WRITER = """
import sys
from vmd.parent.statemem import StateMemory
memory, number = StateMemory(int(sys.argv[1])), 0
print("ready", flush=True)
while True:
    number += 1
    memory.write(b"%d " % number * (number * 7919 % 20000), followed=True)
    while memory.takes_changes:
        memory.add(b"%d " % number * 300)
"""


@pytest.mark.deep
def test_a_complete_content_is_found_after_a_kill(memory: StateMemory) -> None:
    """A real process only writes, and is killed at random moments, again and again."""
    memory.write(b"0 ")
    for _ in range(ROUNDS_OF_KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(memory.fd)], pass_fds=[memory.fd], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            for _ in range(random.Random(writer.pid).randrange(1, 40)):
                memory.read()  # what is read during a write may be torn
            writer.send_signal(signal.SIGKILL)
        found = memory.read()
        assert found
        words = b" ".join(found).split()
        assert len(set(words)) <= 1, "two contents are mixed"
