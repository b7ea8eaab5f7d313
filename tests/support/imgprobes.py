"""Processes in the place of imgprobe, and of seeder, that do not do what these do."""

import mmap
import os
import signal

from vmd.ipc.bootmsg import BootFile, pack_file
from vmd.ipc.probemsg import ANSWER_MAX, Probe, pack_image
from vmd.ipc.probing import serve
from vmd.ipc.seedmsg import pack_made

GOOD = pack_image(Probe(format="raw", size=1))


def hang() -> int:
    """Say nothing, for ever."""
    signal.pause()
    return 0


def stay() -> int:
    """Answer, and do not end."""
    return serve(lambda _arguments, _files: GOOD) or hang()


def trickle() -> int:
    """Stop in the middle."""
    return serve(lambda _arguments, _files: GOOD[:5])


def flood() -> int:
    """Answer with more than a line has."""
    return serve(lambda _arguments, _files: b"x" * (2 * ANSWER_MAX))


def nonsense() -> int:
    """Answer something else."""
    return serve(lambda _arguments, _files: b"image\0vmdk\0" + GOOD)


def die() -> int:
    """End without a word."""
    return 3


def be_killed() -> int:
    """End as the filter ends processes, in the middle of a question."""

    def answer(_arguments: list[str], _files: list[int]) -> bytes:
        signal.signal(signal.SIGSYS, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSYS)
        return GOOD

    return serve(answer)


def write_image() -> int:
    """Try to change the image; answer whether that was possible as its size."""

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        try:
            size = os.pwrite(files[0], b"x", 0)
        except OSError:
            size = 0
        return pack_image(Probe(format="raw", size=size))

    return serve(answer)


def leave_open() -> int:
    """Make a seed that can still be changed."""

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        os.write(files[1], b"seed")
        return pack_made([])

    return serve(answer)


def claim() -> int:
    """Be an imgboot that says it has copied what it has not."""
    return serve(lambda _arguments, _files: pack_file(BootFile(size=1 << 40, name="disk0:/vmlinuz")))


def keep() -> int:
    """Be an imgboot that keeps a way to change what it has copied."""
    kept = []

    def answer(_arguments: list[str], files: list[int]) -> bytes:
        size = os.fstat(files[-1]).st_size
        kept.append(mmap.mmap(files[-1], size))
        return pack_file(BootFile(size=size, name="disk0:/vmlinuz"))

    return serve(answer)


def overstep() -> int:
    """Be an imgboot that would write to the disk, and have a larger file; its options say what was possible."""

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
