"""What `vmctl status -v` says is wrong with the devices of a VM."""

import time

from vmctl.output import clean
from vmd.ipc.messages.clients import TroubleInfo


def describe(vm_name: str, trouble: TroubleInfo) -> str:
    """Return a line."""
    return f"{clean(vm_name)} {clean(trouble.device)}: {clean(trouble.text)}{since(trouble.since_s)}"


def since(seconds: int) -> str:
    """Return the words for a time; none for a number that is no time, because it comes from the VM."""
    try:
        return time.strftime(" (since %Y-%m-%d %H:%M:%S)", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return ""


def as_json(trouble: TroubleInfo) -> dict[str, object]:
    """Return a trouble under keys that stay."""
    return {"device": clean(trouble.device), "text": clean(trouble.text), "since": trouble.since_s}
