"""Which process the kernel kills when memory runs out: a VM rather than a process that all VMs depend on."""

import contextlib
import os

from vmd.errors import HostError
from vmd.log import log
from vmd.parent.usage import children

# The score of the parent, which vmm and priv inherit.  It is above that of programs that a host cannot do without.
# Processes that the parent starts again when they have ended, such as control, are as likely to be killed as any
# program (`spawn.LEAF_SCORE`).
CORE_SCORE = -500
SCORE = "oom_score_adj"  # proc_pid_oom_score_adj(5)


class OomScores:
    """The scores of the core and of VMs."""

    def __init__(self) -> None:
        """Make the core less likely to be killed.  VMs keep the score that the daemon was started with."""
        self.usual: int | None = None
        self.lower()

    def lower(self) -> None:
        """Lower the score of the parent."""
        pid = os.getpid()
        try:
            with open(f"/proc/{pid}/{SCORE}", encoding="ascii") as file:
                usual = int(file.read())
            if usual > CORE_SCORE:
                set_score(pid, CORE_SCORE)
                self.usual = usual
        except OSError as error:
            log.info(f"{HostError(f'lower {SCORE}', error)}: when memory runs out, the kernel may end all VMs")

    def give_back(self) -> None:
        """Set the parent's score back for the program that is executed in its place.  Raises OSError."""
        if self.usual is not None:
            set_score(os.getpid(), self.usual)

    def give_usual(self, vm: int) -> None:
        """Give the process of a VM and its devices the usual score.  `vm` is a pid; 0: the VM has no process."""
        if self.usual is None or not vm:
            return
        for pid in (vm, *children(vm)):
            with contextlib.suppress(OSError):  # it has just ended
                set_score(pid, self.usual)


def set_score(pid: int, score: int) -> None:
    """Set the score of a process.  Raises OSError."""
    with open(f"/proc/{pid}/{SCORE}", "w", encoding="ascii") as file:
        file.write(str(score))
