"""Processes in the place of imgprobe that do not do what it does."""

import os
import signal

from vmd.ipc.probemsg import ANSWER_MAX, FD_ANSWER, FD_IMAGE, Probe, pack_image

GOOD = pack_image(Probe(format="raw", size=1))


def hang() -> int:
    """Say nothing, for ever."""
    signal.pause()
    return 0


def stay() -> int:
    """Answer, and do not end."""
    os.write(FD_ANSWER, GOOD)
    return hang()


def close_and_stay() -> int:
    """Answer completely, and do not end."""
    os.write(FD_ANSWER, GOOD)
    os.close(FD_ANSWER)
    return hang()


def trickle() -> int:
    """Stop in the middle."""
    os.write(FD_ANSWER, GOOD[:5])
    return hang()


def flood() -> int:
    """Answer without an end."""
    while True:
        os.write(FD_ANSWER, b"x" * ANSWER_MAX)


def nonsense() -> int:
    """Answer something else."""
    os.write(FD_ANSWER, b"image\0vmdk\0" + GOOD)
    return 0


def die() -> int:
    """End without a word."""
    return 3


def be_killed() -> int:
    """End as the filter ends processes."""
    signal.signal(signal.SIGSYS, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSYS)
    return 0


def write_image() -> int:
    """Try to change the image; answer whether that was possible as its size."""
    try:
        size = os.pwrite(FD_IMAGE, b"x", 0)
    except OSError:
        size = 0
    os.write(FD_ANSWER, pack_image(Probe(format="raw", size=size)))
    return 0
