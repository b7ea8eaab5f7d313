"""How a VM ended: a word for programs, and a sentence for people."""

from vmd.config.model import BootDevice
from vmd.ipc.messages.vm import Outcome
from vmd.parent.groups import HOST
from vmd.scaled import fmt_scaled

POWERED_OFF = "powered off"  # by its guest, without a request
STOPPED = "stopped"  # by its guest, on request
KILLED = "killed"  # by force, or because its guest did not shut down
REBOOTED = "rebooted"  # by its guest, and not started again
SENT = "sent"
FAILED = "failed"  # it could not be started, or could not continue

AS_ASKED = "stopped as asked"


def for_lack_of_memory(lack: str, limit_bytes: int, text: str) -> str:
    """Return why a VM ended when the kernel killed its process for lack of memory; `lack` is a `groups.memory_lack`."""
    if lack == HOST:
        return f"host out of memory: {text}"
    size = f" of {fmt_scaled(limit_bytes)}" if limit_bytes else ""
    return f"memory limit{size} reached: {text}"


def how_it_ended(outcome: Outcome, *, asked: bool, sent: bool) -> str:
    """Return the word for the end of a VM process; `asked`: a stop of the VM was requested."""
    if sent:
        return SENT
    if outcome is Outcome.POWER_OFF:
        return STOPPED if asked else POWERED_OFF
    if outcome is Outcome.REBOOT:  # OpenBSD reboots when it is asked to shut down
        return STOPPED if asked else REBOOTED
    if outcome is Outcome.ENDED or (outcome is Outcome.KILLED and asked):
        return KILLED
    return FAILED


# A boot image given for one start is not available for the next, so the VM stops at a reset (*cat. 4.4*).
ONLY_THAT_START = "only that start said what to boot"
# Guests are booted from these to be installed.  A reset means that the installation is finished; it must not run again.
# Unlike vmd, `boot device disk` does not stop a VM at a reset.
ONCE = {BootDevice.CDROM: "it was booted from the CD", BootDevice.NET: "it was booted from the network"}


def not_again(why: str) -> str:
    """Return the sentence for a VM whose guest has reset itself and that is not started again."""
    return f"rebooted; not started again because {why}"
