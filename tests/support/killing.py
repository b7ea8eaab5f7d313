"""Does priv's work in a child that is killed right after a chosen change to the host."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from vmd.priv import host, sysctl, tap

LOOKING = ("get", "dump", "show")  # commands of pyroute2 that only read
Call = Callable[..., Any]


class Killer:
    """Counts changes, writes each to `report`, and kills this process after change number `turn` (from 0)."""

    def __init__(self, turn: int, report: int) -> None:
        self.turn = turn
        self.report = report
        self.count = 0

    def after(self, what: str, call: Call) -> Call:
        """Return a function that calls `call`, counts the change, and may then kill this process."""

        def changing(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - it replaces any function
            result = call(*arguments, **options)
            if not arguments or arguments[0] not in LOOKING:
                words = [str(value) for value in (*arguments, *options.values()) if isinstance(value, int | str)]
                os.write(self.report, f"{what} {' '.join(words).splitlines()[0]}\n".encode())
                if self.count == self.turn:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.count += 1
            return result

        return changing

    def lie_in_wait(self, patch: pytest.MonkeyPatch, network: host.HostNetwork) -> None:
        """Wrap all functions that change the host: netlink, settings, rules, taps, and priv's own file."""
        netlink = network.links.netlink
        for name in ("link", "addr", "route"):
            patch.setattr(netlink, name, self.after(name, getattr(netlink, name)), raising=False)
        patch.setattr(network.nft, "apply", self.after("nft", network.nft.apply))
        patch.setattr(tap, "claim", self.after("tap", tap.claim))
        patch.setattr(sysctl, "write", self.after("set", sysctl.write))
        for name in ("pwrite", "ftruncate", "unlink"):
            patch.setattr(os, name, self.after(name, getattr(os, name)))


def die_after(turn: int, work: Callable[[host.HostNetwork], None]) -> tuple[bool, list[str]]:
    """Do some work in a child that is killed after change number `turn`; with -1 it is not killed.

    Return whether that change was reached, and the changes made.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            network = host.HostNetwork()
            with pytest.MonkeyPatch.context() as patch:
                Killer(turn, writer).lie_in_wait(patch, network)
                work(network)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, encoding="utf-8") as report:
        changes = report.read().splitlines()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"it failed by itself, after {changes}"
    return killed, changes
