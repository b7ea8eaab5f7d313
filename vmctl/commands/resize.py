"""vmctl resize: make a disk of a VM larger."""

from vmctl.errors import ArgumentError, refused
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused
from vmd.scaled import fmt_scaled, scan_scaled


def run(session: Session, given: Given) -> int:
    """Resize the disk, and print its new size.  Raises CommandError."""
    word, disk, text = given.operands
    ref = parse_vmref(word)
    size_bytes = disk_size(text)
    try:
        answer = session.client.resize(ref, disk, size_bytes)
    except Refused as error:
        raise refused("resize vm command failed", error) from None
    told = "" if answer.running else "; it does not run"
    warn(f"{answer.disk} of vm {answer.vmid} has {fmt_scaled(answer.size_bytes)} now{told}")
    if session.json:
        put_json(
            {
                "id": answer.vmid,
                "name": clean(answer.name),
                "disk": clean(answer.disk),
                "path": clean(answer.path),
                "size_bytes": answer.size_bytes,
                "running": answer.running,
            }
        )
    return 0


def disk_size(text: str) -> int:
    """Return the bytes of a size.  Raises ArgumentError."""
    try:
        size = scan_scaled(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise ArgumentError(f"invalid disk size: {text}")
    return size
