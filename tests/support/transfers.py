"""vmctl send and receive with a test in between, which may read, change or stop the stream."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.waiting import pause
from vmd.ipc.imsg import pack, unpack
from vmd.record import Record
from vmd.vm.header import Header
from vmd.vm.state import MachineState
from vmd.vm.stream import COUNT, DIGEST_BYTES, END, PREAMBLE, SECTION, STATE

Change = Callable[[Header], Record]
PIECE = 1 << 16


def vmctl(vmd: Daemon, *arguments: str, stdin: int | None = None, stdout: int | None = None) -> "subprocess.Popen[str]":
    """Start vmctl with these descriptors as standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, *arguments],
        cwd=vmd.code,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", timeout_s: float = DEADLINE_S) -> tuple[int, str]:
    """Wait for the end; return exit status and output."""
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors


def move(
    vmd: Daemon, name: str, to: str, *, send: tuple[str, ...] = (), receive: tuple[str, ...] = (),
    into: Daemon | None = None, timeout_s: float = DEADLINE_S,
) -> tuple[str, str]:  # fmt: skip
    """Do `vmctl send NAME | vmctl receive TO`, both successful; return their output."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sender = vmctl(vmd, "send", *send, name, stdout=writing)
    os.close(writing)
    receiver = vmctl(into or vmd, "receive", *receive, to, stdin=reading)
    os.close(reading)
    received, sent = ended(receiver, timeout_s), ended(sender, timeout_s)
    assert (received[0], sent[0]) == (0, 0), f"{sent[1]}{received[1]}\n--- log of vmd\n{vmd.log}"
    return sent[1], received[1]


def to_file(vmd: Daemon, name: str, path: Path, *options: str) -> str:
    """Do `vmctl send NAME > path`, successfully; return its output."""
    with path.open("wb") as file:
        status, errors = ended(vmctl(vmd, "send", *options, name, stdout=file.fileno()))
    assert status == 0, f"{errors}\n--- log of vmd\n{vmd.log}"
    return errors


def from_file(vmd: Daemon, name: str, path: Path, *options: str) -> tuple[int, str]:
    """Do `vmctl receive NAME < path`; return exit status and output."""
    with path.open("rb") as file:
        return ended(vmctl(vmd, "receive", *options, name, stdin=file.fileno()))


class Relay:
    """A sender, a receiver, and a thread between them that changes the header and corrects its digest."""

    def __init__(self, vmd: Daemon, name: str, to: str, change: Callable[[bytes], bytes]) -> None:
        self.change = change
        self.reading, theirs = os.pipe2(os.O_CLOEXEC)
        self.sender = vmctl(vmd, "send", name, stdout=theirs)
        os.close(theirs)
        theirs, self.writing = os.pipe2(os.O_CLOEXEC)
        self.receiver = vmctl(vmd, "receive", to, stdin=theirs)
        os.close(theirs)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def ended(self) -> tuple[tuple[int, str], tuple[int, str]]:
        """Wait for both; return exit status and output of the sender and of the receiver."""
        received, sent = ended(self.receiver), ended(self.sender)
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        return sent, received

    def _run(self) -> None:
        with os.fdopen(self.reading, "rb") as source, os.fdopen(self.writing, "wb") as sink:
            with contextlib.suppress(BrokenPipeError):
                sink.write(self.change(read_preamble(source.read)))
                while data := source.read1(PIECE):
                    sink.write(data)
                    sink.flush()
            with contextlib.suppress(BrokenPipeError):
                sink.close()


def read_preamble(read: Callable[[int], bytes]) -> bytes:
    """Read up to the end of the header's digest."""
    raw = read(PREAMBLE.size)
    return raw + read(PREAMBLE.unpack(raw)[2] + DIGEST_BYTES)


def changed_header(preamble: bytes, change: Change) -> bytes:
    """Return a preamble with another header."""
    magic, version, _ = PREAMBLE.unpack_from(preamble)
    body = pack(change(unpack(Header, preamble[PREAMBLE.size : -DIGEST_BYTES])))
    return signed(PREAMBLE.pack(magic, version, len(body)) + body)


def changed_version(preamble: bytes, version: int) -> bytes:
    """Return a preamble of another version."""
    magic, _, length = PREAMBLE.unpack_from(preamble)
    return signed(PREAMBLE.pack(magic, version, length) + preamble[PREAMBLE.size : -DIGEST_BYTES])


def signed(raw: bytes) -> bytes:
    """Return bytes followed by their digest."""
    return raw + hashlib.sha256(raw).digest()


class Stream:
    """A sent stream, parsed into its parts."""

    def __init__(self, raw: bytes) -> None:
        self.preamble = raw[: PREAMBLE.size + PREAMBLE.unpack_from(raw)[2] + DIGEST_BYTES]
        self.sections = list(_sections(raw, len(self.preamble)))

    @property
    def header(self) -> Header:
        """The header."""
        return unpack(Header, self.preamble[PREAMBLE.size : -DIGEST_BYTES])

    @property
    def state(self) -> MachineState:
        """The machine's state."""
        (body,) = (body for kind, body in self.sections if kind == STATE)
        return unpack(MachineState, body)

    def with_header(self, change: Change) -> bytes:
        """Return the stream with another header."""
        return changed_header(self.preamble, change) + self._rest(self.sections)

    def with_state(self, change: "Callable[[MachineState], Record] | bytes") -> bytes:
        """Return the stream with another state and correct digests."""
        body = change if isinstance(change, bytes) else pack(change(self.state))
        return self.preamble + self._rest([(kind, body if kind == STATE else old) for kind, old in self.sections])

    def with_sections(self, change: "Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]]") -> bytes:
        """Return the stream with other sections, and their new count."""
        sections = change([each for each in self.sections if each[0] != END])
        return self.preamble + self._rest([*sections, (END, COUNT.pack(len(sections)))])

    @staticmethod
    def _rest(sections: list[tuple[int, bytes]]) -> bytes:
        return b"".join(signed(SECTION.pack(kind, 0, len(body)) + body) for kind, body in sections)


def _sections(raw: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at < len(raw):
        kind, _, length = SECTION.unpack_from(raw, at)
        at += SECTION.size
        yield kind, raw[at : at + length]
        at += length + DIGEST_BYTES


def open_files(pid: int) -> int:
    """Return how many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


LASTING = ("vmd: priv", "vmd: control", "vmd: vmm")
RESERVE = {"vmd: vm", "vmd: opener", "vmd: imgprobe", "vmd: control/reserve"}
OF_THE_NEXT_VM = {"vmd: vionet", "vmd: vioblk"}  # the reserve prepares those that the last VM had


def is_settled(processes: Collection[str]) -> bool:
    """Return whether all permanent and reserve processes exist, and priv runs no other program."""
    return set(processes) >= RESERVE | {*LASTING} and all(title.startswith("vmd: ") for title in processes)


class Footprint:
    """A daemon's resources: the titles of its processes, and the descriptors of the permanent ones."""

    def __init__(self, vmd: Daemon) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_settled(processes := vmd.processes()):
            assert time.monotonic() < deadline, processes
            pause()
        vmd.must("status")  # all earlier requests are done
        self.titles = sorted(set(processes) - OF_THE_NEXT_VM)
        self.files = {title: open_files(processes[title]) for title in LASTING} | {"parent": open_files(vmd.pid)}

    def check(self, vmd: Daemon) -> None:
        """Wait until the daemon has no more resources than this.  An ended VM's console stays for a second.

        It may have fewer: at the first count, vmm may have been about to put a process in reserve.  Raises
        AssertionError at the deadline.
        """
        deadline = time.monotonic() + DEADLINE_S
        while not (now := Footprint(vmd)).is_within(self):
            assert time.monotonic() < deadline, f"{now}, before: {self}"
            pause()

    def is_within(self, other: "Footprint") -> bool:
        """Return whether the processes are the same, with no more descriptors."""
        return self.titles == other.titles and all(count <= other.files[title] for title, count in self.files.items())

    def __repr__(self) -> str:
        return f"{self.titles} {self.files}"
