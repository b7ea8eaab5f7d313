"""vmctl snapshot: make, list, delete and go back to snapshots of a VM's disks."""

import time

from vmctl.bar import Bar
from vmctl.errors import ArgumentError, UsageError, refused
from vmctl.options import Given
from vmctl.output import SHOWN_DATE, clean, put_json, put_lines, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused
from vmd.images.names import check_name
from vmd.ipc.messages.clients import SnapshotRequest, SnapshotsDone
from vmd.ipc.messages.shared import SNAPSHOT_DONE, SnapshotAction, SnapshotInfo, TransferProgress
from vmd.scaled import fmt_scaled

TAG_NOW = "%Y-%m-%d_%H:%M:%S"


def run(session: Session, given: Given) -> int:
    """List, delete or go back to a snapshot; without an option make one.  Without a tag it is called by the time."""
    ref = parse_vmref(given.operand)
    tag = given.operands[1] if len(given.operands) > 1 else ""
    action = SnapshotAction.CREATE
    for option, meant in (("-d", SnapshotAction.DELETE), ("-l", SnapshotAction.LIST), ("-r", SnapshotAction.GO_BACK)):
        if given.has(option):
            action = meant
    if action is SnapshotAction.LIST and tag:
        raise UsageError(f"unexpected argument: {tag}")
    if action is SnapshotAction.CREATE:
        try:
            tag = check_name(tag or time.strftime(TAG_NOW))
        except ValueError as error:
            raise ArgumentError(str(error)) from None
    elif action is not SnapshotAction.LIST and not tag:
        raise UsageError("missing argument: tag")
    found: list[SnapshotInfo] = []
    try:
        request = SnapshotRequest(vmid=ref.vmid, name=ref.name, action=action, tag=tag)
        client = session.client
        bar = Bar(str(ref), rate=True, shown=not session.quiet)

        def on_part(part: SnapshotInfo | TransferProgress) -> None:
            if isinstance(part, SnapshotInfo):
                found.append(part)
            else:
                bar.follow(part)

        try:
            answer = client.carry_out(request, SnapshotsDone, on_part)
        finally:
            bar.end()
    except Refused as error:
        raise refused("snapshot vm command failed", error) from None
    found.sort(key=lambda one: one.date_s)
    listing = action is SnapshotAction.LIST
    if not listing:
        warn(f"{SNAPSHOT_DONE[action]} {answer.tag} of vm {answer.name}")
    if session.json:
        put_json({
            "id": answer.vmid,
            "name": clean(answer.name),
            "tag": None if listing else clean(answer.tag),
            "snapshots": list(map(described, found)) if listing else None,
        })  # fmt: skip
    elif listing:
        put_lines(table(found))
    return 0


def described(one: SnapshotInfo) -> dict[str, object]:
    """Return a snapshot for --json."""
    return {
        "tag": clean(one.tag),
        "made": one.date_s,
        "memory_bytes": one.state_bytes,
        "complete": one.disks == one.of_disks,
    }


def table(found: list[SnapshotInfo]) -> list[str]:
    """Return the lines of the table, with a header."""
    width = max([len("TAG"), *(len(clean(one.tag)) for one in found)])
    lines = [f"{'TAG':<{width}}  {'MADE':<19}  {'MEMORY':>7}"]
    for one in found:
        memory = fmt_scaled(one.state_bytes) if one.state_bytes else "-"
        made = time.strftime(SHOWN_DATE, time.localtime(one.date_s))
        partial = "" if one.disks == one.of_disks else f"  incomplete: {one.disks} of {one.of_disks} disks have it"
        lines.append(f"{clean(one.tag):<{width}}  {made}  {memory:>7}{partial}")
    return lines
