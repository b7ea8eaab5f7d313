"""Finds the imgwriter of `vmctl snapshot` while it runs."""

import contextlib
import subprocess
import time
from collections.abc import Iterator

from tests.support.daemon import DEADLINE_S, Daemon


def imgwriter(vmd: Daemon) -> int:
    """Return the pid of the imgwriter, or 0."""
    return next((pid for title, pid in vmd.family().items() if "imgwriter" in title), 0)


@contextlib.contextmanager
def caught(vmd: Daemon, *words: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run `vmctl snapshot` until its imgwriter is seen; yield both.  The pid is 0 if the imgwriter ended too soon."""
    with subprocess.Popen(
        [*vmd.client, "-s", vmd.socket, "snapshot", *words], stderr=subprocess.PIPE, text=True, cwd=vmd.code
    ) as client:
        deadline = time.monotonic() + DEADLINE_S
        while not (pid := imgwriter(vmd)) and client.poll() is None:
            assert time.monotonic() < deadline
        yield client, pid
