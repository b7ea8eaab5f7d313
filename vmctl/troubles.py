"""The problems of the devices of a VM, as `vmctl status -v` shows them."""

import time

from vmctl.output import clean
from vmd.ipc.messages.clients import TroubleInfo


def describe(vm_name: str, trouble: TroubleInfo) -> str:
    """Return the line of a trouble."""
    return f"{clean(vm_name)} {clean(trouble.device)}: {clean(trouble.text)}{since(trouble.since_s)}"


def since(seconds: int) -> str:
    """Return the words for a time.  The number comes from the VM: "" if it is not a time."""
    try:
        return time.strftime(" (since %Y-%m-%d %H:%M:%S)", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return ""


def as_json(trouble: TroubleInfo) -> dict[str, object]:
    """Return a trouble for --json."""
    return {"device": clean(trouble.device), "text": clean(trouble.text), "since": trouble.since_s}
