"""Processes in the place of imgprobe, and of seeder, that do not do what these do."""

import os
import signal

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
