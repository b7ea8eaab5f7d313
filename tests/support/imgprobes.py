"""Misbehaving replacements of the processes imgprobe, seeder and imgboot."""

import mmap
import os
import signal

from vmd.ipc.bootmsg import BootFile, pack_file
from vmd.ipc.probemsg import ANSWER_MAX, Probe, pack_image
from vmd.ipc.probing import serve
from vmd.ipc.seedmsg import pack_made

GOOD = pack_image(Probe(format="raw", size=1))


def hang() -> int:
    """Never answer."""
    signal.pause()
    return 0


def stay() -> int:
    """Answer, but do not end."""
    return serve(lambda _arguments, _files: GOOD) or hang()


def trickle() -> int:
    """Stop in the middle of the answer."""
    return serve(lambda _arguments, _files: GOOD[:5])


def flood() -> int:
    """Answer with more bytes than an answer may have."""
    return serve(lambda _arguments, _files: b"x" * (2 * ANSWER_MAX))


def nonsense() -> int:
    """Give an answer of another kind."""
    return serve(lambda _arguments, _files: b"image\0vmdk\0" + GOOD)


def die() -> int:
    """End without an answer."""
    return 3


def be_killed() -> int:
    """Die from SIGSYS before the answer, as if the seccomp filter had killed the process."""

    def answer(_arguments: list[str], _files: list[int]) -> bytes:
        signal.signal(signal.SIGSYS, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSYS)
        return GOOD

    return serve(answer)


def write_image() -> int:
    """Try to change the image; answer with the number of bytes written as its size."""

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        try:
            size = os.pwrite(files[0], b"x", 0)
        except OSError:
            size = 0
        return pack_image(Probe(format="raw", size=size))

    return serve(answer)


def leave_open() -> int:
    """Make a seed, but leave it writable."""

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        os.write(files[1], b"seed")
        return pack_made([])

    return serve(answer)


def claim() -> int:
    """Be an imgboot that reports a file that it has not copied."""
    return serve(lambda _arguments, _files: pack_file(BootFile(size=1 << 40, name="disk0:/vmlinuz")))


def keep() -> int:
    """Be an imgboot that keeps a writable mapping of the copied file."""
    kept = []

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        size = os.fstat(files[-1]).st_size
        kept.append(mmap.mmap(files[-1], size))
        return pack_file(BootFile(size=size, name="disk0:/vmlinuz"))

    return serve(answer)


def overstep() -> int:
    """Be an imgboot that tries to write to the disk and to extend the file; its options tell what succeeded."""

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        image, memory = files
        size, possible = os.fstat(memory).st_size, ""
        for letter, fd, offset in (("a", image, 0), ("s", memory, size)):
            try:
                os.pwrite(fd, b"x", offset)
            except OSError:
                continue
            possible += letter
        return pack_file(BootFile(size=size, name="disk0:/vmlinuz", options=possible))

    return serve(answer)
