"""How the life of a VM ended: in one word, for programs, and in a sentence, for people."""

from vmd.config.model import BootDevice
from vmd.ipc.messages.vm import Outcome
from vmd.parent.groups import HOST
from vmd.scaled import fmt_scaled

POWERED_OFF = "powered off"  # by its guest, unasked
STOPPED = "stopped"  # by its guest, as asked
KILLED = "killed"  # without its guest: by force, or because that did not shut down
REBOOTED = "rebooted"  # by its guest, and not started again
SENT = "sent"
FAILED = "failed"  # it could not be started, or could not go on

AS_ASKED = "stopped as asked"


def for_lack_of_memory(lack: str, limit_bytes: int, text: str) -> str:
    """Return why a VM has ended of which the kernel has killed a process; `lack` is one of `groups.memory_lack`."""
    if lack == HOST:
        return f"host out of memory: {text}"
    size = f" of {fmt_scaled(limit_bytes)}" if limit_bytes else ""
    return f"memory limit{size} reached: {text}"


def how_it_ended(outcome: Outcome, *, asked: bool, sent: bool) -> str:
    """Return the word for the end of a VM process; `asked`: the VM was to stop."""
    if sent:
        return SENT
    if outcome is Outcome.POWER_OFF:
        return STOPPED if asked else POWERED_OFF
    if outcome is Outcome.REBOOT:  # as OpenBSD ends when it is asked to
        return STOPPED if asked else REBOOTED
    if outcome is Outcome.ENDED or (outcome is Outcome.KILLED and asked):
        return KILLED
    return FAILED


# What only one start had cannot be had again: such a VM stops where others reboot (*cat. 4.4*).
ONLY_THAT_START = "only that start said what to boot"
# Booting from these is for installing: a guest that resets itself is done, and must not begin anew.
# Unlike vmd, where `boot device disk` stops as well.
ONCE = {BootDevice.CDROM: "it was booted from the CD", BootDevice.NET: "it was booted from the network"}


def not_again(why: str) -> str:
    """Return the sentence for a VM whose guest has reset itself and that is not started again."""
    return f"rebooted; not started again because {why}"
